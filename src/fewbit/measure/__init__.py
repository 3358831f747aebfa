# SPDX-License-Identifier: Apache-2.0
"""What :func:`fewbit.evaluation.evaluate` measures, one question a file: accuracy, speed, memory, energy, size."""
