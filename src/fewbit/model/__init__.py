# SPDX-License-Identifier: Apache-2.0
"""Models: who feeds whom, and one block at a time from disk. Importing this package imports no transformers."""
