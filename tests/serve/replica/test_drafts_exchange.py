"""One replica that changes its drafts while it writes: the checkpoint stays where it is, and no text changes."""

import asyncio
import gc
import shutil
import weakref
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from frozen import save_drafts_bundle
from hf_folders import save_checkpoint

from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.messages.text_delta import GenerationFailed
from serve_apps.replica.decoder_app import DecoderApp
from serve_apps.rollout.model_version import ServingTarget, resolve_model
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.model.drafts_file import DRAFTS
from tidar_core.config import SamplingConfig
from tidar_core.transformer.model import TidarModel

PROMPT = "def add(a, b):\n    return"
SAMPLING = {"max_tokens": 60, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    return save_checkpoint(tmp_path_factory.mktemp("frozen") / "base", tokenizer)


@pytest.fixture(scope="module")
def version(checkpoint, tmp_path_factory):
    """Function that makes a version of the checkpoint; with a copy of it, or with its address."""
    settings = ServeSettings(model="-", rows=2, own_process=False, mode="single-pass")

    def make(seed, **changes):
        folder = save_drafts_bundle(tmp_path_factory.mktemp("drafts") / "bundle", checkpoint, seed=seed, **changes)
        return replace(resolve_model(settings, folder)[0], version=seed)

    return make


@pytest.fixture(scope="module")
def old(version):
    return version(1)


@pytest.fixture(scope="module")
def new(version, checkpoint):
    """Other drafts, in a bundle that names the checkpoint."""
    served = version(2, base_uri=str(checkpoint))
    assert not list(Path(served.bundle_uri).glob("*.safetensors"))
    return served


@pytest.fixture(scope="module")
def text(oracle_text, checkpoint):
    return oracle_text(PROMPT, model=load_bundle(checkpoint).model, ignore_eos=True, **SAMPLING)[0]


def request(request_id="r"):
    return GenerationRequest(request_id=request_id, prompt=PROMPT, sampling=SamplingConfig(**SAMPLING), ignore_eos=True)


async def answer(app):
    """Fingerprint and text."""
    deltas = [delta async for delta in app.generate(request())]
    assert not isinstance(deltas[-1], GenerationFailed), deltas[-1]
    return deltas[0].fingerprint, "".join(delta.text for delta in deltas)


def states(app):
    return {report.version: report.state for report in app.pool.reports()}


async def follow(app, champion, challenger=None):
    app.pool.follow(ServingTarget(champion=champion, challenger=challenger))
    await app.pool.followed()


@contextmanager
def moved_away(folder):
    """Nothing can read a folder meanwhile."""
    place = folder.rename(folder.with_name("moved"))
    yield
    place.rename(folder)


@pytest.fixture
def models(monkeypatch):
    """Number of models that were made and are still in memory."""
    made, build = weakref.WeakSet(), TidarModel.__init__

    def counted(self, *given, **named):
        build(self, *given, **named)
        made.add(self)

    def living():
        gc.collect()
        return len(made)

    monkeypatch.setattr(TidarModel, "__init__", counted)
    return living


def test_new_drafts_load_alone_under_a_text_in_flight(old, new, text, checkpoint, models):
    async def swap():
        app, before = DecoderApp(old), models()
        model = app.pool.champion.engine.scheduler.decoder.model
        addresses = {name: weight.data_ptr() for name, weight in model.named_parameters()}
        async with aclosing(app.generate(request("long"))) as began:
            deltas = [await anext(began)]
            with moved_away(checkpoint):
                await follow(app, new)
            assert states(app) == {"1": "leaving", "2": "champion"}
            assert len(app.pool.engines) == 1
            assert models() == before
            assert await answer(app) == (new.fingerprint, text)
            deltas += [delta async for delta in began]
        assert {delta.fingerprint for delta in deltas} - {""} == {old.fingerprint}
        assert "".join(delta.text for delta in deltas) == text
        assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == addresses
        assert app.pool.champion.engine.scheduler.decoder.model is model
        assert states(app) == {"1": "gone", "2": "champion"}
        assert [(r.totals.texts, r.totals.errors) for r in app.pool.reports()] == [(1, 0), (1, 0)]
        loaded = load_bundle(new.bundle_uri).model.state_dict()
        assert all((loaded[name] == weight).all() for name, weight in model.named_parameters())
        await app.check_health()

    asyncio.run(swap())


def test_a_new_replica_begins_with_a_bundle_that_names_its_checkpoint(new, text):
    async def start():
        app = DecoderApp(new)
        assert (await app.tokenizer_info()).model_dump()["chat_template"]
        assert await answer(app) == (new.fingerprint, text)

    asyncio.run(start())


def test_drafts_that_come_back_belong_to_the_same_texts_again(old, new, text):
    async def there_and_back():
        app = DecoderApp(old)
        generator = app.pool.champion
        async with aclosing(app.generate(request("long"))) as began:
            deltas = [await anext(began)]
            await follow(app, new)
            await follow(app, old)
            assert app.pool.champion is generator
            assert states(app) == {"1": "champion", "2": "gone"}
            deltas += [delta async for delta in began]
        assert "".join(delta.text for delta in deltas) == text
        assert await answer(app) == (old.fingerprint, text)

    asyncio.run(there_and_back())


def test_drafts_that_were_exchanged_become_the_challenger_in_an_engine_of_their_own(old, new, text):
    async def change():
        app = DecoderApp(old)
        async with aclosing(app.generate(request("long"))) as began:
            deltas = [await anext(began)]
            app.pool.follow(ServingTarget(champion=new, challenger=old))
            deltas += [delta async for delta in began]
        await app.pool.followed()
        assert "".join(delta.text for delta in deltas) == text
        assert states(app) == {"1": "challenger", "2": "champion"}
        assert len(app.pool.engines) == 2
        assert await answer(app) == (new.fingerprint, text)

    asyncio.run(change())


def test_drafts_of_another_shape_or_decoding_get_an_engine_of_their_own(old, new, version):
    others = [
        version(3, rank=3),
        replace(new, block_len=3),
        replace(new, settings=new.settings.model_copy(update={"rows": 3})),
        replace(new, drafts=None),
        replace(new, drafts=replace(new.drafts, base_hash="another")),
    ]
    assert new.shares_base(old)
    assert not any(other.shares_base(old) for other in others)

    async def change():
        app = DecoderApp(old)
        engine = app.pool.champion.engine
        await follow(app, others[0])
        assert states(app) == {"1": "gone", "3": "champion"}
        assert app.pool.champion.engine is not engine

    asyncio.run(change())


@pytest.mark.parametrize("damage", ["changed", "missing", "another bundle"])
def test_drafts_that_cannot_be_loaded_leave_the_old_drafts_at_work(old, new, text, damage, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(new.bundle_uri, folder)
    drafts, wrong = folder / DRAFTS, replace(new, bundle_uri=str(folder), version=9)
    problem = {"changed": "drafts.safetensors has hash", "missing": "holds no drafts/", "another bundle": "has hash"}
    if damage == "changed":
        content = bytearray(drafts.read_bytes())
        content[-1] ^= 1
        drafts.write_bytes(content)
    elif damage == "missing":
        drafts.unlink()
    else:
        wrong = replace(wrong, bundle_hash="another")

    async def fail():
        app = DecoderApp(old)
        await follow(app, wrong)
        assert states(app) == {"1": "champion", "9": "failed"}
        (failed,) = [report for report in app.pool.reports() if report.state == "failed"]
        assert problem[damage] in failed.problem
        assert await answer(app) == (old.fingerprint, text)

    asyncio.run(fail())


@pytest.mark.slow
def test_the_engine_s_own_process_loads_drafts_and_lives_on(old, new, text):
    own = old.settings.model_copy(update={"own_process": True})
    old, new = (replace(served, settings=own) for served in (old, new))

    async def swap():
        app = DecoderApp(old)
        pid = (await app.load()).decoder_pid
        async with aclosing(app.generate(request("long"))) as began:
            deltas = [await anext(began)]
            await follow(app, new)
            assert await answer(app) == (new.fingerprint, text)
            deltas += [delta async for delta in began]
        assert "".join(delta.text for delta in deltas) == text
        assert (await app.load()).decoder_pid == pid
        await follow(app, replace(old, bundle_uri="/gone", bundle_hash="gone"))
        assert states(app)["1"] == "failed"
        assert await answer(app) == (new.fingerprint, text)
        app.pool.champion.engine.stop()

    asyncio.run(swap())
