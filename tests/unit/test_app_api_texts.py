"""The OpenAPI description says what everything means, and its examples are valid."""

import pytest

from app import schemas
from app.api_texts import EXAMPLES, FIELDS


@pytest.fixture(scope="module")
async def openapi(client) -> dict:
    return (await client.get("/openapi.json")).json()


async def test_every_field_and_parameter_is_described(openapi):
    known = openapi["components"]["schemas"]
    fields = {
        f"{name}.{field}": value for name, one in known.items() for field, value in one.get("properties", {}).items()
    }
    calls = [(path, call) for path, methods in openapi["paths"].items() for call in methods.values()]
    fields |= {f"{path}?{one['name']}": one for path, call in calls for one in call.get("parameters", ())}
    assert [name for name, value in fields.items() if not value.get("description")] == []
    names = fields.keys() | {name.replace("?", ".").rsplit(".", 1)[-1] for name in fields}
    assert FIELDS.keys() - names == set()


@pytest.mark.parametrize("name", EXAMPLES)
async def test_examples_are_valid_and_shown(openapi, client, name):
    getattr(schemas, name).model_validate(EXAMPLES[name])
    assert openapi["components"]["schemas"][name]["examples"] == [EXAMPLES[name]]
    page = (await client.get("/docs")).text
    assert page.count("<pre>") == len(EXAMPLES) and "Send the answer as Server-Sent Events" in page


async def test_the_page_shows_code_as_code_and_problems_once(client):
    page = (await client.get("/docs")).text
    assert "`" not in page and "<code>Authorization: Bearer &lt;key&gt;</code>" in page
    assert page.count("application/problem+json") == 1 and "4XX" not in page
