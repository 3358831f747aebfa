# SPDX-License-Identifier: Apache-2.0
"""Containers: which file. They read and write bytes and names; they know no model and no kernel."""
