"""The peer of serve_http that runs in LitServe, which pickles its class into another process: a module of its own.

    python -m benchmarks.serve_litserve RUN PORT
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.serve_http import SLOTS, Direct


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.direct = Direct(sys.argv[1])

    def decode_request(self, request: Request) -> bytes:
        return request["file"].file.read()

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, batch: list[bytes]) -> list[bytes]:
        return self.direct(batch)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Any:
        return Response(output, media_type="audio/wav")


if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=SLOTS, batch_timeout=0.0), accelerator="cpu")
    server.run(port=int(sys.argv[2]), host="127.0.0.1", generate_client_file=False, log_level="error")
