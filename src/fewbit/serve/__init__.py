# SPDX-License-Identifier: Apache-2.0
"""The OpenAI protocol over HTTP. Needs the extra ``serve`` (starlette, uvicorn, prometheus-client)."""
