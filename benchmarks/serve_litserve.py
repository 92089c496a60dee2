"""The peer of serve_http that runs in LitServe, which pickles its class into another process: a module of its own.

    python -m benchmarks.serve_litserve RUN PORT
"""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve
from starlette.responses import Response

from benchmarks.serve_http import LITSERVE, SLOTS, Direct


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.direct = Direct(sys.argv[1])

    def decode_request(self, request: dict[str, str]) -> bytes:
        return base64.b64decode(request["file"])

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, batch: list[bytes]) -> list[bytes]:
        return self.direct(batch)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Any:
        return Response(output, media_type="audio/wav")


if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=SLOTS, batch_timeout=0.0, api_path=LITSERVE), accelerator="cpu")
    server.run(port=int(sys.argv[2]), host="127.0.0.1", generate_client_file=False, log_level="error")
