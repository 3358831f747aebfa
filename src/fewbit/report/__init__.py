# SPDX-License-Identifier: Apache-2.0
"""Reports: what was measured, as a terminal table, a model card and one self-contained HTML page."""
