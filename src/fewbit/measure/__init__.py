# SPDX-License-Identifier: Apache-2.0
"""What :func:`fewbit.evaluate.evaluate` measures, one question a file: accuracy, speed, memory, energy, size."""
