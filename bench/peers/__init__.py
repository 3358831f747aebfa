# SPDX-License-Identifier: Apache-2.0
"""Other people's kernels behind the interface of :mod:`peers.row`, one file a peer."""
