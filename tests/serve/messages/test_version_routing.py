"""Choice of the version that answers a request."""

from serve_apps.messages.version_routing import Route, role_of


def test_the_split_is_by_the_hash_of_challenger_and_client():
    for user, byte in (("ann", 0x8C), ("bob", 0x42)):  # printf "abc user ann" | sha256sum | cut -c1-2
        route = Route(f"user {user}")
        assert role_of(route, "abc", (byte + 1) / 256) == "challenger"
        assert role_of(route, "abc", byte / 256) == "champion"


def test_nobody_is_sent_to_a_challenger_of_weight_0_and_everybody_to_one_of_weight_1():
    routes = [Route(f"user {n}") for n in range(300)]
    assert {role_of(route, "abc", 0.0) for route in routes} == {"champion"}
    assert {role_of(route, "abc", 1.0) for route in routes} == {"challenger"}


def test_a_share_of_clients_is_sent_there_and_more_weight_takes_none_of_them_away():
    routes = [Route(f"user {n}") for n in range(1000)]
    few, more = ({route for route in routes if role_of(route, "abc", w) == "challenger"} for w in (0.1, 0.3))
    assert (len(few), len(more)) == (90, 284)
    assert few < more


def test_another_challenger_is_tried_on_other_clients():
    routes = [Route(f"user {n}") for n in range(1000)]
    one, other = ({r for r in routes if role_of(r, challenger, 0.1) == "challenger"} for challenger in ("abc", "abd"))
    assert len(one) == 90
    assert len(one & other) == 4
