"""Whatever /openapi.json allows and forbids, sent at random: never a 5xx, and every error in the one shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis

from avray.settings.serve import JobSettings, LimitSettings, ReplicaSettings, ServeSettings
from tests.serving import save_codec_lm, save_continuation, server

LIMITS = LimitSettings(audio_seconds_out=0.5, body_timeout_s=5.0, prompt_characters=64)


@pytest.mark.slow
def test_no_server_error_for_anything_the_schema_knows(tmp_path: Path) -> None:
    serve = ServeSettings(limits=LIMITS, replica=ReplicaSettings(slots=2), jobs=JobSettings(str(tmp_path / "jobs")))
    models = {"next": save_continuation(tmp_path / "next"), "speech": save_codec_lm(tmp_path / "speech")}
    with server(models, serve) as client:
        schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
        statuses: set[int] = set()
        for operation in schema.get_all_operations():
            _try(client, operation.ok(), statuses)
        assert 200 in statuses and 400 in statuses and client.get("/v1/health/ready").status_code == 200


def _try(client: Any, operation: Any, statuses: set[int]) -> None:
    @hypothesis.settings(max_examples=15, suppress_health_check=list(hypothesis.HealthCheck), deadline=None)
    @hypothesis.given(case=operation.as_strategy(), model=hypothesis.strategies.sampled_from(["next", "speech", None]))
    def sent(case: Any, model: str | None) -> None:
        if model is not None and isinstance(case.body, dict) and "model" in case.body:
            case.body = {**case.body, "model": model}
        wire = requests.Request(**case.as_transport_kwargs(base_url="http://127.0.0.1")).prepare()
        headers = {name: value for name, value in wire.headers.items() if name.lower() != "content-length"}
        response = client.request(wire.method, wire.url, content=wire.body, headers=headers)
        statuses.add(response.status_code)
        assert response.status_code < 500, (wire.url, wire.body, response.text)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    sent()
