# SPDX-License-Identifier: Apache-2.0
"""Hosts that run fewbit's folders: transformers, and what stands on it (lm-eval)."""
