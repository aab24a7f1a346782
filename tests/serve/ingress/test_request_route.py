"""The client and the version that the headers of a request name."""

import pytest

from serve_apps.api.errors import ParameterError
from serve_apps.ingress.request_route import route_of
from serve_apps.messages.version_routing import Route, role_of

SESSION = {"x-session-id": "s", "authorization": "Bearer k"}


@pytest.mark.parametrize(
    ("headers", "user", "key"),
    [
        (SESSION, "u", "session s"),
        ({"authorization": "Bearer k"}, "u", "user u"),
        ({"authorization": "Bearer k"}, None, "key Bearer k"),
        ({"x-session-id": ""}, "", "cmpl-1"),
    ],
)
def test_a_client_is_known_by_its_session_else_its_user_else_its_key_else_each_request_is_its_own(headers, user, key):
    assert route_of(headers, user, "cmpl-1") == Route(key, None)


@pytest.mark.parametrize("role", ["champion", "challenger"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_version_that_a_header_names_answers_whatever_the_weight(role, weight):
    route = route_of(SESSION | {"x-tidar-version": role}, None, "cmpl-1")
    assert role_of(route, "abc", weight) == role


def test_another_version_than_these_two_is_refused_in_one_line():
    with pytest.raises(ParameterError, match="x-tidar-version is 'v2'; it must be champion or challenger; drop it"):
        route_of({"x-tidar-version": "v2"}, None, "cmpl-1")
