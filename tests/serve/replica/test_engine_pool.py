"""One replica that changes its weights while it writes, without Ray around it."""

import asyncio
import dataclasses
import gc
import weakref
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve_apps.api.errors import ParameterError
from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.messages.text_delta import GenerationFailed
from serve_apps.messages.version_routing import CHALLENGER, CHAMPION, Route
from serve_apps.replica.decoder_app import DecoderApp
from serve_apps.rollout.canary import CanarySettings
from serve_apps.rollout.model_version import ServingTarget, resolve_model
from serve_apps.settings import ServeSettings
from tidar_core.config import SamplingConfig
from tidar_core.errors import TidarError

PROMPT = "def add(a, b):\n    return"
SAMPLING = {"max_tokens": 60, "temperature": 3.0, "seed": 5}


@pytest.fixture(scope="module")
def old(bundle):
    return resolve_model(ServeSettings(model=bundle, rows=2, own_process=False))[0]


@pytest.fixture(scope="module")
def new(other_bundle, old):
    return dataclasses.replace(resolve_model(ServeSettings(model=other_bundle))[0], settings=old.settings)


@pytest.fixture(scope="module")
def texts(oracle_text, old, new, other_model):
    """Text of each version."""
    texts = {
        old.fingerprint: oracle_text(PROMPT, **SAMPLING)[0],
        new.fingerprint: oracle_text(PROMPT, model=other_model, **SAMPLING)[0],
    }
    assert len(set(texts.values())) == 2
    return texts


def request(request_id="r", **route):
    sampling = SamplingConfig(**SAMPLING)
    return GenerationRequest(request_id=request_id, prompt=PROMPT, sampling=sampling, route=Route(**route))


async def answer(app, **route):
    """Fingerprint and text; a refusal is raised."""
    pieces = [piece async for piece in app.generate(request(**route))]
    if isinstance(pieces[-1], GenerationFailed):
        raise pieces[-1].error
    return pieces[0].fingerprint, "".join(piece.text for piece in pieces)


def states(app):
    return {report.fingerprint: report.state for report in app.pool.reports()}


def damaged(served, tmp_path):
    """The same bundle, one byte of its weights another."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in Path(served.bundle_uri).iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            content[-1] ^= 1
        (folder / file.name).write_bytes(content)
    return dataclasses.replace(served, bundle_uri=str(folder), version=9)


def test_a_text_that_began_before_ends_on_the_old_weights_and_the_next_is_of_the_new(old, new, texts):
    async def swap():
        app = DecoderApp(old)
        weights = weakref.ref(app.pool.champion.engine.scheduler.decoder.model)
        gc.collect()
        gc.freeze()  # as Serve does when a replica has started: what is in a cycle now stays for ever
        async with aclosing(app.generate(request("long"))) as began:
            pieces = [await anext(began)]
            app.pool.follow(ServingTarget(champion=new))
            await app.pool.followed()
            assert states(app) == {old.fingerprint: "leaving", new.fingerprint: "champion"}
            assert await answer(app) == (new.fingerprint, texts[new.fingerprint])
            pieces += [piece async for piece in began]
        assert pieces[0].fingerprint == old.fingerprint
        assert "".join(piece.text for piece in pieces) == texts[old.fingerprint]
        assert states(app) == {old.fingerprint: "gone", new.fingerprint: "champion"}
        return weights, app

    try:
        weights, app = asyncio.run(swap())  # ends with the work of its threads
        assert weights() is None
    finally:
        gc.unfreeze()
    assert [(r.totals.texts, r.totals.errors) for r in app.pool.reports()] == [(1, 0), (1, 0)]


def test_weights_that_come_back_before_they_have_left_are_not_loaded_again(old, new):
    async def there_and_back():
        app = DecoderApp(old)
        writer = app.pool.champion
        async with aclosing(app.generate(request("long"))) as began:
            await anext(began)
            app.pool.follow(ServingTarget(champion=new))
            await app.pool.followed()
            app.pool.follow(ServingTarget(champion=old))
            await app.pool.followed()
        assert app.pool.champion is writer
        assert states(app) == {old.fingerprint: "champion", new.fingerprint: "gone"}

    asyncio.run(there_and_back())


def test_no_third_engine_is_loaded_while_one_is_leaving(old, new, bundle, tmp_path):
    third = resolve_model(ServeSettings(model=bundle, mode="autoregressive", own_process=False))[0]
    third = dataclasses.replace(third, bundle_uri=damaged(old, tmp_path).bundle_uri, bundle_hash="third")

    async def in_turn():
        app = DecoderApp(old)
        async with aclosing(app.generate(request("long"))) as began:
            await anext(began)
            app.pool.follow(ServingTarget(champion=new))
            await app.pool.followed()
            app.pool.follow(ServingTarget(champion=third))
            for _ in range(20):  # as often as the event loop likes: nothing may come of it
                await asyncio.sleep(0)
            assert third.fingerprint not in states(app)
        await app.pool.followed()
        assert states(app)[third.fingerprint] == "failed"

    asyncio.run(in_turn())


def test_beside_a_challenger_a_replica_has_memory_for_three_bundles_and_no_more(old, new, tmp_path, monkeypatch):
    third = dataclasses.replace(damaged(old, tmp_path), bundle_hash="third")
    loaded = []

    async def change():
        app = DecoderApp(old)
        app.pool.follow(ServingTarget(champion=old, challenger=new))
        await app.pool.followed()
        make = app.pool._made

        def counted(*arguments):
            loaded.append(len(app.pool.generators) + 1)
            return make(*arguments)

        monkeypatch.setattr(app.pool, "_made", counted)
        app.pool.follow(ServingTarget(champion=third, challenger=new))
        await app.pool.followed()
        app.pool._problems.clear()
        app.pool.follow(ServingTarget(champion=old, challenger=third))
        await app.pool.followed()

    asyncio.run(change())
    assert loaded == [3, 2]  # another challenger loads once the one before has left


def test_a_challenger_answers_requests_for_it_and_its_share_and_is_promoted_without_being_loaded_again(old, new, texts):
    canary = old.settings.model_copy(update={"challenger": CanarySettings(weight=0.5)})
    old, new = (dataclasses.replace(served, settings=canary) for served in (old, new))

    async def rise():
        app = DecoderApp(old)
        with pytest.raises(ParameterError, match="no challenger is served here now"):
            await answer(app, role=CHALLENGER)
        app.pool.follow(ServingTarget(champion=old, challenger=new))
        await app.pool.followed()
        challenger = app.pool.generators[1]
        assert await answer(app, role=CHALLENGER) == (new.fingerprint, texts[new.fingerprint])
        assert await answer(app, role=CHAMPION) == (old.fingerprint, texts[old.fingerprint])
        split = [[(await answer(app, key=f"user {n}"))[0] for n in range(8)] for _ in range(2)]
        assert split[0] == split[1]
        assert set(split[0]) == {old.fingerprint, new.fingerprint}
        assert (await app.load()).pages == 2 * challenger.engine.scheduler.pool.pages
        app.pool.follow(ServingTarget(champion=new))
        await app.pool.followed()
        assert app.pool.champion is challenger
        assert states(app) == {old.fingerprint: "gone", new.fingerprint: "champion"}
        with pytest.raises(ParameterError):
            await answer(app, role=CHALLENGER)

    asyncio.run(rise())


def test_a_bundle_that_cannot_be_loaded_leaves_the_old_weights_at_work_and_reports_its_error(
    old, new, texts, tmp_path, caplog
):
    caplog.set_level("INFO", logger="ray.serve")
    wrong = damaged(new, tmp_path)

    async def fail():
        app = DecoderApp(old)
        for target in (ServingTarget(champion=wrong), ServingTarget(champion=old, challenger=wrong)):
            app.pool.follow(target)
            await app.pool.followed()
            assert await answer(app) == (old.fingerprint, texts[old.fingerprint])
            (failed,) = [report for report in app.pool.reports() if report.state == "failed"]
            assert failed.version == "9"
            assert "model.safetensors has hash" in failed.problem
        await app.check_health()
        app.pool.follow(ServingTarget(champion=old))  # as after a rollback
        await app.pool.followed()
        assert await answer(app) == (old.fingerprint, texts[old.fingerprint])

    asyncio.run(fail())
    (logged,) = [record.getMessage() for record in caplog.records if "cannot be loaded" in record.getMessage()]
    assert "model.safetensors has hash" in logged


def test_a_challenger_that_does_not_decode_is_given_up_and_the_champion_goes_on(old, new, texts):
    async def break_down():
        app = DecoderApp(old)
        app.pool.follow(ServingTarget(champion=old, challenger=new))
        await app.pool.followed()
        app.pool.generators[1].engine.stop()
        await app.check_health()
        assert states(app) == {old.fingerprint: "champion", new.fingerprint: "failed"}
        assert await answer(app) == (old.fingerprint, texts[old.fingerprint])
        app.pool.champion.engine.stop()
        with pytest.raises(RuntimeError):
            await app.check_health()

    asyncio.run(break_down())


def test_whoever_changes_his_mind_while_weights_are_loaded_gets_what_he_wants_in_the_end(old, new, texts, tmp_path):
    wrong = damaged(new, tmp_path)

    async def change():
        app = DecoderApp(old)
        app.pool.follow(ServingTarget(champion=new))
        await asyncio.sleep(0)  # it has begun
        assert states(app)[new.fingerprint] == "loading"
        app.pool.follow(ServingTarget(champion=wrong, challenger=old))
        app.pool.follow(ServingTarget(champion=old))
        await app.pool.followed()
        assert states(app) == {old.fingerprint: "champion", new.fingerprint: "gone"}
        assert await answer(app) == (old.fingerprint, texts[old.fingerprint])

    asyncio.run(change())


def test_what_failed_to_load_is_tried_again_after_five_minutes(old, new, texts, tmp_path):
    wrong, clock = damaged(new, tmp_path), SimpleNamespace(now=1000.0)

    async def mend():
        app = DecoderApp(old, clock=lambda: clock.now)
        app.pool.follow(ServingTarget(champion=wrong))
        await app.pool.followed()
        for file in Path(new.bundle_uri).glob("*.safetensors"):
            (Path(wrong.bundle_uri) / file.name).write_bytes(file.read_bytes())
        clock.now += 300
        app.pool.follow(ServingTarget(champion=wrong))
        await app.pool.followed()
        assert app.pool.champion.served == old
        clock.now += 1
        app.pool.follow(ServingTarget(champion=wrong))
        await app.pool.followed()
        assert await answer(app) == (new.fingerprint, texts[new.fingerprint])

    asyncio.run(mend())


def test_serves_hook_changes_the_weights_and_keeps_them_where_the_model_is_not_to_be_had(old, new, texts, other_bundle):
    async def reconfigure():
        app = DecoderApp(old)
        for wrong in ({"model": "/no/such/bundle"}, {"modell": other_bundle}):
            await app.reconfigure(wrong)
            assert (await answer(app))[0] == old.fingerprint
        await app.reconfigure({"model": other_bundle})
        assert await answer(app) == (new.fingerprint, texts[new.fingerprint])

    asyncio.run(reconfigure())


def test_a_new_replica_loads_what_its_config_names_and_needs_the_model_of_the_start_no_more(old, other_bundle, new):
    gone = dataclasses.replace(old, bundle_uri="/deleted")

    async def start(user_config):
        app = DecoderApp(gone, configured=True)
        await app.reconfigure(user_config)
        return app.pool.champion.served.fingerprint, states(app)

    assert asyncio.run(start({"model": other_bundle})) == (new.fingerprint, {new.fingerprint: "champion"})
    with pytest.raises(TidarError, match="/deleted"):
        asyncio.run(start({}))


@pytest.mark.parametrize("user_config", [{}, {"model": "/nowhere"}, {"modle": "/nowhere"}])
def test_a_new_replica_whose_config_names_nothing_that_is_there_serves_what_the_service_started_with(old, user_config):
    async def start():
        app = DecoderApp(old, configured=True)
        await app.reconfigure(user_config)
        return states(app)

    assert asyncio.run(start()) == {old.fingerprint: "champion"}


def test_a_config_that_names_no_model_any_more_brings_back_what_the_service_started_with(old, new, other_bundle):
    async def there_and_back():
        app = DecoderApp(old, configured=True)
        await app.reconfigure({})
        await app.reconfigure({"model": other_bundle})
        assert states(app) == {old.fingerprint: "gone", new.fingerprint: "champion"}
        await app.reconfigure({})
        return states(app)

    assert asyncio.run(there_and_back()) == {old.fingerprint: "champion", new.fingerprint: "gone"}
