"""Requests that no client should send: none fails the server, hangs it, leaks a page or changes others' answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode, checks
from server.fuzzing import check_idle, fuzz, small_service
from server.scripted import serving

from nanoglm.server.app import create_app


def try_many(seed: int, count: int, drafts: int) -> None:
    service = small_service(drafts=drafts)
    statuses, findings = asyncio.run(fuzz(create_app(service), service, seed, count))
    assert not findings, f"{len(findings)} findings in {count} requests:\n" + "\n".join(findings[:5])
    # A fuzzer whose requests are all refused at the door tries nothing.
    assert statuses[200] > count / 5 and statuses[400] and statuses[404] and statuses[405]


@pytest.mark.parametrize("drafts", [0, 2])
def test_hundreds_of_spoiled_requests(drafts: int) -> None:
    try_many(drafts, 300, drafts)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "drafts"), [(11, 0), (12, 2), (13, 0), (14, 2)])
def test_ten_thousand_spoiled_requests(seed: int, drafts: int) -> None:
    try_many(seed, 2500, drafts)


# ------------------------------------------------------------------------------- the document
# Not whether what the document allows is accepted: fields have meanings that no JSON schema says.
CONFORMANCE = [
    checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_headers_conformance, checks.response_schema_conformance,
]  # fmt: skip


def follow_the_document(url: str, examples: int) -> int:
    """Sends what the OpenAPI document allows and what it does not; how many requests that were."""
    count = 0
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()
        both = operation.method == "post" or operation.query  # there is no wrong way to say the rest
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)[: 1 + bool(both)]:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            def one(case: Any) -> None:
                nonlocal count
                count += 1
                case.validate_response(case.call(timeout=30), checks=CONFORMANCE)

            one()
    return count


@pytest.mark.parametrize("examples", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_the_document_says_what_is_answered(examples: int) -> None:
    service = small_service(context=512)
    with serving(service) as url:
        assert follow_the_document(url, examples) > 16 * examples
    asyncio.run(check_idle(service))
