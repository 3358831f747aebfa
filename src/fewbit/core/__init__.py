# SPDX-License-Identifier: Apache-2.0
"""The waist: plain values that every axis shares. Imports torch and :mod:`fewbit.errors`, nothing else of fewbit."""
