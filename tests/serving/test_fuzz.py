"""Whatever is sent to the HTTP interface, it answers, and never with a 500.

``DCOMPILE_EXAMPLES=5000 pytest tests/serving/test_fuzz.py`` looks longer.
"""

import os

import pytest
import schemathesis
from fake_client import FakeClient
from hypothesis import HealthCheck, settings

from dcompile.serving.http import app_of
from dcompile.serving.settings import Limits

EXAMPLES = int(os.environ.get("DCOMPILE_EXAMPLES", "40"))
app = app_of({"fake": FakeClient()}, Limits(images=2), chooses_caching=True)
schema = schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.full
@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=10_000, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent(case: schemathesis.Case) -> None:
    answer = case.call()
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and answer.status_code not in (404, 405):
        assert answer.json()["error"]["message"]
