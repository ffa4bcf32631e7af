"""The OpenAPI document held against the app: generated requests, over the engine double."""

from __future__ import annotations

from typing import Any, cast

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from support.api_double import DoubleEngine, app_over, bearer, instance, served, snapshot


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_generated_requests_get_documented_answers() -> None:
    """No request causes a failure, every answer matches the schema of its status."""
    engine = DoubleEngine(snapshots=[snapshot(instance())])
    with served(app_over(engine)) as url:
        document = httpx.get(f"{url}/openapi.json").json()
        schema = schemathesis.openapi.from_dict(document)
        operations = [cast(Any, result).ok() for result in schema.get_all_operations()]
        cases = st.one_of(*(operation.as_strategy() for operation in operations))
        statuses = set()

        @settings(
            max_examples=150,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def answers_match(case: schemathesis.Case[Any]) -> None:
            answer = case.call(base_url=url, headers=bearer(), timeout=30)
            assert answer.status_code < 500 or answer.status_code == 501, answer.text
            if answer.status_code != 204:
                case.operation.validate_response(answer)
            statuses.add(answer.status_code)

        answers_match()
    assert {200, 400, 404} <= statuses
