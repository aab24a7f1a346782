"""Answers of a decoder whose slots are shared by prompts, turns and units equal the plain autoregressive loop's."""

import shutil
from collections import Counter

import pytest
from answering import QUESTIONS, answers_job, save_chat_bundle

from pipelines.answers.answerer import Answerer, Conversation
from pipelines.answers.prompts import Prompt
from pipelines.answers.variants import Variant, variants_of
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.chat_tokens import encode_chat
from tidar_core.decoding.autoregressive import generate_autoregressive

TURNS = ("Name it.", "And then?", "Why?")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a bundle, the bundle, and its chat template."""
    folder = save_chat_bundle(tmp_path_factory.mktemp("chat"))
    return folder, load_bundle(folder), load_chat_template(folder)


def user(*texts):
    return [{"content": text, "role": "user"} for text in texts]


def answered(model, conversations, **changes):
    """Answer conversations, and return them when all have ended."""
    folder, bundle, template = model
    answerer = Answerer(bundle, template, answers_job("p", "o", folder, **changes), uri=folder)
    done = []
    for conversation in conversations:
        answerer.submit(conversation, done.append)
    while answerer.busy:
        answerer.advance()
    assert sorted(map(id, done)) == sorted(map(id, conversations))
    return conversations


def by_the_plain_loop(model, prompt, variant, max_tokens=12):
    """Answers to the turns of a prompt, one token at a time; text and finish reason of each."""
    _, bundle, template = model
    job = answers_job("p", "o", "m", max_tokens=max_tokens)
    ends = (*bundle.end_ids, bundle.tokenizer.special_ids["<|im_end|>"])
    messages, answers = [], []
    for question in prompt.messages:
        messages.append(question)
        ids = tuple(encode_chat(template, bundle.tokenizer, messages))
        tokens = generate_autoregressive(bundle.model, ids, variant.sampling(job, ends))
        ended = tokens[-1] in ends
        stream = bundle.tokenizer.stream(after=ids)
        text = "".join(map(stream.push, tokens[:-1] if ended else tokens))  # half a character at a cut stays away
        answers.append((text + stream.flush() if ended else text, "stop" if ended else "length", len(tokens)))
        if not ended:
            break
        messages.append({"content": answers[-1][0], "role": "assistant"})
    return answers


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("mode", ["autoregressive", "single-pass"])
def test_greedy_and_sampled_answers_to_all_turns_equal_the_plain_loop_s_for_every_batch(model, batch, mode):
    prompts = [Prompt(user(question, *TURNS[: n % 4])) for n, question in enumerate(QUESTIONS)]
    job = answers_job("p", "o", "m", greedy=0.5, sampled=0.5)
    conversations = [Conversation(prompt, v) for prompt in prompts for v in variants_of(job, prompt.key)]
    answered(model, conversations, batch=batch, mode=mode)
    for each in conversations:
        found = [(answer.text, answer.finish_reason, answer.tokens) for answer in each.answers]
        assert found == by_the_plain_loop(model, each.prompt, each.variant)
    kinds = Counter(
        (each.variant.temperature == 0, answer.finish_reason) for each in conversations for answer in each.answers
    )
    assert len(kinds) == 4  # greedy and sampled answers, cut and ended ones
    assert max(len(each.answers) for each in conversations) > 1


def test_a_checkpoint_that_does_not_draft_answers_as_the_plain_loop(model, tmp_path):
    folder = shutil.copytree(model[0], tmp_path / "checkpoint")
    (folder / "tidar.json").unlink()
    checkpoint = str(folder), load_bundle(folder), load_chat_template(folder)
    assert not checkpoint[1].model.config.drafting
    conversations = [Conversation(Prompt(user(question)), Variant(0.0, 0)) for question in QUESTIONS]
    for each in answered(checkpoint, conversations, mode="auto"):
        found = [(answer.text, answer.finish_reason, answer.tokens) for answer in each.answers]
        assert found == by_the_plain_loop(checkpoint, each.prompt, each.variant)


def test_every_answer_follows_its_question_and_is_part_of_the_next_prompt(model):
    (whole,) = answered(model, [Conversation(Prompt(user(QUESTIONS[9], *TURNS)), Variant(0.0, 0))], max_tokens=40)
    roles = [message["role"] for message in whole.messages]
    assert len(whole.answers) > 1
    assert roles == ["user", "assistant"] * len(whole.answers)
    assert [message["content"] for message in whole.messages[1::2]] == [answer.text for answer in whole.answers]


def test_conversations_that_come_while_others_run_fill_the_free_slots(model):
    folder, bundle, template = model
    answerer = Answerer(bundle, template, answers_job("p", "o", folder, batch=2), uri=folder)
    done, later = [], [Conversation(Prompt(user(question)), Variant(0.0, 0)) for question in QUESTIONS]
    most = 0
    while later or answerer.busy:
        if later:
            answerer.submit(later.pop(), done.append)
        answerer.advance()
        most = max(most, answerer._scheduler.taken_slots)
    assert most == 2
    for each in done:
        assert [answer.text for answer in each.answers] == [by_the_plain_loop(model, each.prompt, each.variant)[0][0]]


def test_a_stop_string_ends_an_answer_and_the_next_question_follows(model):
    variant, prompt = Variant(0.0, 0), Prompt(user(QUESTIONS[8], TURNS[1]))
    (plain,) = answered(model, [Conversation(prompt, variant)], max_tokens=12)
    text = plain.answers[0].text
    stop = text[2:4]
    (cut,) = answered(model, [Conversation(prompt, variant)], max_tokens=12, stop=(stop,))
    first = cut.answers[0]
    assert (first.text, first.finish_reason, first.stop_reason) == (text[: text.index(stop)], "stop", stop)
    assert cut.messages[1]["stop_reason"] == stop
    assert len(cut.answers) == 2


def test_the_name_of_a_special_token_ends_an_answer(model):
    _, bundle, _ = model
    conversations = [Conversation(Prompt(user(f"{n}?")), Variant(1.0, n)) for n in range(60)]
    mask = bundle.tokenizer.special_ids["<|mask|>"]
    assert mask not in bundle.end_ids
    found = [a for each in answered(model, conversations, stop=("<|mask|>",), max_tokens=40) for a in each.answers]
    named = [answer for answer in found if answer.stop_reason == "<|mask|>"]
    assert named
    assert all("<|mask|>" not in answer.text for answer in found)


@pytest.mark.parametrize("cut", ["keep", "drop"])
def test_an_answer_that_reaches_max_tokens_ends_the_conversation_and_is_marked_or_dropped(model, cut):
    (whole,) = answered(
        model, [Conversation(Prompt(user(QUESTIONS[0], *TURNS)), Variant(0.0, 0))], cut=cut, max_tokens=3
    )
    assert [answer.finish_reason for answer in whole.answers][-1] == "length"
    kept = [message.get("finish_reason") for message in whole.messages if message["role"] == "assistant"]
    assert ("length" in kept) == (cut == "keep")
    assert (whole.fault is None) == (cut == "keep")


def test_a_question_that_does_not_fit_the_context_is_left_unanswered_and_earlier_answers_stay(model):
    long = Conversation(Prompt(user("a " * 300)), Variant(0.0, 0))
    later = Conversation(Prompt(user(QUESTIONS[9], "a " * 300)), Variant(0.0, 0))
    answered(model, [long, later], max_tokens=40)
    assert long.fault.startswith("is too long: prompt has ")
    assert long.messages == []
    assert later.fault.startswith("is too long")
    assert [message["role"] for message in later.messages] == ["user", "assistant"]


def test_a_conversation_that_the_template_refuses_has_a_fault(model):
    (refused,) = answered(
        model, [Conversation(Prompt([{"content": "a", "role": "judge"}, *user("b")]), Variant(0.0, 0))]
    )
    assert refused.fault.startswith("does not fit the chat template: ")
