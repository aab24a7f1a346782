"""Grammars limit the tokens that may follow, so even an untrained model generates texts that match."""

import json
import re

import jsonschema
import pytest
import torch
from llguidance import LLMatcher, LLParserLimits
from tiny import wide_model

from tidar_core.artifacts.text.grammar import Grammar, compile_constraint
from tidar_core.artifacts.text.tokenizer import Tokenizer, train_bpe
from tidar_core.config import SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.logit_rules import LogitRules
from tidar_core.errors import RequestError
from tidar_core.transformer.shapes import named_shape

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None, 1.5]}, "maxItems": 3},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "age", "alive"],
    "additionalProperties": False,
}
SAMPLED = SamplingConfig(max_tokens=300, temperature=1.0, eos_ids=(0,))


@pytest.fixture(scope="module")
def tokenizer():
    texts = [json.dumps({"name": "abc", "age": n, "tags": ["a", "b"], "alive": True}) for n in range(99)]
    return train_bpe([*texts, "12 345 plain words and more words " * 20], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    """A model with random weights. Vocabulary entries 300..319 are not text tokens; entry 300 is the mask token."""
    return wide_model(named_shape("tiny", vocab_len=tokenizer.vocab_len))


@pytest.fixture
def start(tokenizer, model):
    """start(kind, content) returns the constraint of a new sequence."""
    return lambda kind, content=None: compile_constraint(kind, content, tokenizer).constraint(
        model.config.vocab_size, (tokenizer.eos_id,)
    )


def texts_of(tokenizer, allowed_V):
    return {tokenizer.decode([token]) or "END" for token in allowed_V.nonzero()[:, 0].tolist()}


def generated_text(model, tokenizer, constraint, seed, **fields):
    """Generate a whole text, without its end-of-text token."""
    sampling = SamplingConfig(**{name: getattr(SAMPLED, name) for name in SAMPLED.__slots__} | {"seed": seed} | fields)
    tokens = generate_autoregressive(model, (5, 6, 7), sampling, constraint)
    assert tokens[-1] == tokenizer.eos_id
    return tokenizer.decode(tokens)


def test_two_or_three_digits(tokenizer, start):
    constraint = start("regex", "[0-3]{2,3}")
    one, two = tokenizer.encode("1")[0], tokenizer.encode("2")[0]
    allowed = constraint.allowed([one, two, two, tokenizer.eos_id])
    digits = {"0", "1", "2", "3"}
    pairs = {text for i in range(300) if re.fullmatch("[0-3]{2,3}", text := tokenizer.decode([i]))}
    assert texts_of(tokenizer, allowed[0]) == digits | pairs
    assert texts_of(tokenizer, allowed[1]) == digits | {pair for pair in pairs if len(pair) == 2}
    assert texts_of(tokenizer, allowed[2]) == digits | {"END"}
    assert texts_of(tokenizer, allowed[3]) == {"END"} == texts_of(tokenizer, allowed[4])


def test_a_text_is_finished_when_nothing_but_its_end_may_follow(tokenizer, start):
    constraint = start("choice", ["yes", "yes!"])
    constraint.advance(tokenizer.encode("yes"))
    assert texts_of(tokenizer, constraint.allowed([])[0]) == {"END", "!"}
    assert not constraint.finished
    constraint.advance(tokenizer.encode("!"))
    assert constraint.finished
    constraint.retreat(1)
    assert not constraint.finished
    assert constraint.failure is None


@pytest.mark.parametrize("wrong_at", range(8))
def test_reading_the_allowed_tokens_leaves_the_state_unchanged(tokenizer, start, wrong_at):
    constraint, untouched = start("json_schema", SCHEMA), start("json_schema", SCHEMA)
    for each in (constraint, untouched):
        each.advance(tokenizer.encode('{"na'))
    drafts = tokenizer.encode('me": "b", "age"')
    tokens = [*drafts[:wrong_at], tokenizer.encode("}")[0], tokenizer.eos_id, 310, *drafts[wrong_at:]]
    allowed = constraint.allowed(tokens)
    assert allowed.shape == (len(tokens) + 1, 320)
    for n in range(len(drafts[:wrong_at]) + 1):
        assert torch.equal(allowed[n], untouched.allowed(drafts[:n])[-1])
    assert torch.equal(constraint.allowed(drafts), untouched.allowed(drafts))


def test_unused_entries_and_the_mask_token_are_never_allowed_and_end_of_text_only_where_it_may_end(tokenizer, start):
    anything = start("regex", "(.|\n)*").allowed([])[0]
    plain = [token for token in range(1, 300) if tokenizer.decode([token]).isascii()]
    assert anything[plain].all()
    assert anything[tokenizer.eos_id]
    assert not anything[300:].any()
    assert not start("regex", "(.|\n)+").allowed([])[0, tokenizer.eos_id]


def test_reading_beyond_the_end_of_a_text_leaves_the_state_unchanged(tokenizer, start):
    constraint, end = start("regex", "[0-3]{2,3}"), tokenizer.eos_id
    one = tokenizer.encode("1")[0]
    for more, follows in ((2, {"0", "1", "2", "3", "END"}), (1, {"END"})):
        constraint.advance([one] * more)
        for drafts in ([end], [end, end], [end, end, one], [one, end, end]):
            assert texts_of(tokenizer, constraint.allowed(drafts)[0]) == follows
        constraint.advance([end, end])
        assert constraint.finished
        assert texts_of(tokenizer, constraint.allowed([])[0]) == {"END"}
        constraint.retreat(2)
        assert texts_of(tokenizer, constraint.allowed([])[0]) == follows


def test_every_special_end_token_of_the_request_may_end_a_text():
    fast = train_bpe(["ab"], 257)._fast
    fast.add_special_tokens(["<|other|>", "<|im_end|>"])
    tokenizer = Tokenizer(fast, {"eos_token": "<|endoftext|>"})
    other, im_end, newline = 257, 258, tokenizer.encode("\n")[0]
    grammar = compile_constraint("regex", "(.|\n)", tokenizer)
    constraint = grammar.constraint(320, (im_end, newline, tokenizer.eos_id, 999))
    beginning = constraint.allowed([])[0]
    assert beginning[newline]  # a line break is text
    assert not beginning[[other, im_end, tokenizer.eos_id]].any()
    constraint.advance(tokenizer.encode("a"))
    assert constraint.allowed([])[0].nonzero()[:, 0].tolist() == [tokenizer.eos_id, im_end]
    constraint.advance([im_end, im_end])
    assert constraint.failure is None
    assert constraint.allowed([])[0].nonzero()[:, 0].tolist() == [tokenizer.eos_id, im_end]
    constraint = grammar.constraint(320, (im_end,))
    constraint.advance(tokenizer.encode("a"))
    assert constraint.allowed([])[0].nonzero()[:, 0].tolist() == [im_end]


def test_a_request_without_end_tokens_generates_end_of_text_after_its_text(tokenizer):
    constraint = compile_constraint("choice", ["a"], tokenizer).constraint(320)
    constraint.advance([*tokenizer.encode("a"), tokenizer.eos_id, tokenizer.eos_id])
    assert texts_of(tokenizer, constraint.allowed([])[0]) == {"END"}


@pytest.mark.parametrize("seed", range(12))
def test_every_text_under_a_schema_parses_and_validates(model, tokenizer, start, seed):
    text = generated_text(model, tokenizer, start("json_schema", SCHEMA), seed)
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(text))


def test_greedy_texts_match_the_schema_together_with_the_other_rules(model, tokenizer, start):
    rules = {"bad_words": (tuple(tokenizer.encode("true")),), "repetition_penalty": 1.2, "min_tokens": 250}
    text = generated_text(model, tokenizer, start("json_schema", json.dumps(SCHEMA)), 0, temperature=0.0, **rules)
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(text))
    assert len(tokenizer.encode(text)) < 250  # an ended grammar ends the text


@pytest.mark.parametrize("pattern", [r"[a-c]{3,9}x?", r"(\+\d{1,3} )?\d{4,6}", "é{2}日本?", r"[^a-z\s]{4}"])
def test_every_text_under_a_regex_is_a_full_match(model, tokenizer, start, pattern):
    for seed in range(3):
        assert re.fullmatch(pattern, generated_text(model, tokenizer, start("regex", pattern), seed))


def test_a_text_under_a_choice_is_a_choice(model, tokenizer, start):
    choices = ["yes", "no", 'she said "no"\n', "日本 🎉 \\n", "start: x"]
    texts = {generated_text(model, tokenizer, start("choice", choices), seed, temperature=2.0) for seed in range(12)}
    assert texts <= set(choices)
    assert len(texts) > 1


@pytest.mark.parametrize(
    "grammar", ['start: pair\npair: "(" pair? ")"', 'root ::= pair\npair ::= "(" pair? ")"'], ids=["lark", "gbnf"]
)
def test_a_text_under_a_grammar_nests(model, tokenizer, start, grammar):
    close = tokenizer.encode(")")[0]
    text = generated_text(model, tokenizer, start("grammar", grammar), 3, logit_bias=((close, 9.0),), temperature=4.0)
    half = len(text) // 2
    assert half > 0
    assert text == "(" * half + ")" * half


def test_any_json_object(tokenizer, start):
    constraint = start("json_object")
    text = '{"a": [1, {"b": null}], "c": "x"}'
    allowed = constraint.allowed(tokenizer.encode(text))
    assert all(allowed_V[token] for allowed_V, token in zip(allowed, tokenizer.encode(text)))
    assert texts_of(tokenizer, allowed[-1]) == {"END"}
    assert not start("json_object").allowed([])[0, tokenizer.encode("[")[0]]


def test_white_space_in_json_is_limited(tokenizer, start):
    constraint, space = start("json_object"), tokenizer.encode(" ")[0]
    constraint.advance([*tokenizer.encode("{"), *[space] * 20])
    assert not any(text.isspace() for text in texts_of(tokenizer, constraint.allowed([])[0]))


def test_drafts_under_a_schema_match_it_whatever_the_logits_are(model, tokenizer, start):
    rules = LogitRules(SAMPLED, (), 320, constraint=start("json_schema", SCHEMA))
    sequence = []
    for step in range(200):
        logits = torch.randn(4, 320, generator=torch.Generator().manual_seed(step)) * 3
        drafts = rules.adjust_drafts(logits)
        rules.commit(drafts)
        sequence += drafts
        if drafts[-1] == tokenizer.eos_id:
            break
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(tokenizer.decode(sequence)))


def test_a_grammar_that_needs_too_much_work_ends_the_text_and_reports_it(tokenizer):
    definition = LLMatcher.grammar_from_lark('start: x\nx: x x | "a" | "aa" | "b"')
    grammar = Grammar(definition, tokenizer, LLParserLimits(step_max_items=40, verbose_errors=False))
    constraint = grammar.constraint(320, (tokenizer.eos_id,))
    a = tokenizer.encode("a")[0]
    constraint.advance([a])
    now = constraint.allowed([])
    assert any(texts_of(tokenizer, allowed_V) == {"END"} for allowed_V in constraint.allowed([a] * 9))
    assert constraint.failure is None  # only a draft went too far
    assert torch.equal(constraint.allowed([]), now)
    while constraint.allowed([])[0, a]:
        constraint.advance([a])
    assert constraint.finished
    assert "Too many items" in constraint.failure
    assert constraint.allowed([tokenizer.eos_id]).nonzero()[:, 1].tolist() == [tokenizer.eos_id] * 2


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("regex", "[0-9", "unclosed character class"),
        ("regex", "(?=x)", "look-ahead and look-behind, is not supported"),
        ("regex", r"[^\s\S]", "no text matches it"),
        ("json_schema", "{nope", "the json_schema cannot be used: Expecting property name"),
        ("json_schema", {"type": "objct"}, "the json_schema cannot be used: Invalid type: objct"),
        ("json_schema", {"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ("json_schema", {"$ref": "http://x/y"}, "not present in a registry"),
        ("json_schema", "[" * 100_000, "the json_schema cannot be used: maximum recursion depth"),
        ("grammar", "start: foo", 'unknown name: "foo"'),
        ("choice", [], "it must be a list of one or more texts"),
        ("choice", ["a", 1], "it must be a list of one or more texts"),
        ("xml", "", "the grammar's kind is 'xml'; it must be one of json_schema, json_object, regex, choice, grammar"),
    ],
)
def test_an_invalid_grammar_is_refused_in_one_line(tokenizer, kind, content, message):
    with pytest.raises(RequestError) as raised:
        compile_constraint(kind, content, tokenizer)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
