"""Plain English in every text of the project, and examples of each rule.

`python tests/support/english.py PATH...` lists the problems of a path.
"""

import pytest
from english import blocks, document_problems, problems_of, python_problems, sentences, sources, word_count


def rules(text, **kind):
    return [problem.rule for problem in python_problems(text, **kind)]


def docstring_rules(docstring):
    return rules(f'"""{docstring}"""\n')


def test_texts_are_plain_english():
    assert "\n".join(str(problem) for path in sources() for problem in problems_of(path)) == ""


@pytest.mark.parametrize(
    "docstring",
    [
        "Counts an HTTP request while it is in flight; lifespan events are not counted.",
        "Rates of one request, e.g. those of a new client.",
        "Client of an `Engine` in a child process, with the same methods.",
        "Replicas = share of busy slots + queued tokens / (throughput x scale_queue_seconds); more if caches are full.",
        "Calls one replica and retries on another if it dies.",
        "Decay per verification: old counts fade, so positions not tried recently are explored again.",
        'Table."""\n\nN = 1\n"""How many one-CPU tasks to submit at once so that `workers` of them always run.',
        "Table of paths.\n\nHow do they differ?",
        "Long-run accepted length of each chain,\nas a mean over `sequences`.",
        "clock   seconds, ascending\nplan    one plan of one sequence",
    ],
)
def test_statements_pass(docstring):
    assert docstring_rules(docstring) == []


@pytest.mark.parametrize(
    "docstring",
    [
        "Of how many tasks of one CPU each Ray should know, so that `workers` of them always run.",
        "By mood.",
        "For the tests.",
        "From a file.",
        "With a table.",
        "Where tokens lie.",
        "Whose turn it is.",
        "How do they differ?",
        "In which order are rows read?",
        "What a replica answers; one that dies of it is not the last to be asked.",
        "Rows of tokens",
        "Is this a question?",
    ],
)
def test_fragments_and_questions_begin_no_docstring(docstring):
    assert any("docstring" in rule for rule in docstring_rules(docstring))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('"""Sends what it has of it, and says the same."""', "says"),
        ('"""Table."""\n# the service is told of it', "told"),
        ('"""Table."""\n\n\ndef _ask_replica():\n    pass', "ask"),
        ('"""Table."""\nclass _ToldTokens:\n    pass', "told"),
        ('"""Table."""\nlaw_PXN = 1', "law"),
        ('"""Table."""\nraise ValueError(f"{name} has no law")', "law"),
        ('"""Lengths of plans under the stationary law."""', "law"),
        ('"""Every walk comes back to a whole block."""', "walk"),
        ('"""Table."""\nwatcher = 1', "watcher"),
        ('"""Table."""\nways = 1', "ways"),
    ],
)
def test_banned_words_are_found_in_texts_and_names(text, word):
    assert any(rule.startswith(f"`{word}`") for rule in rules(text))


@pytest.mark.parametrize(
    "text",
    [
        '"""Table of the `asked` tokens."""',
        '"""Table."""\nfor node in ast.walk(tree):\n    loader.pin_memory(node, ask=1)',
        '"""Table."""\nalias_watcher = AliasWatcherApp = 1',
        '"""Pinned memory, and a dashboard that is copied the same way."""',
        '"""Table of tasks, masks and lawful flasks."""',
    ],
)
def test_words_that_only_look_alike_pass(text):
    assert rules(text) == []


def test_a_sentence_has_at_most_25_words():
    assert docstring_rules("Word " + "word " * 23 + "word.") == []
    assert docstring_rules("Word " + "word " * 24 + "word.") == ["a sentence has at most 25 words, not 26"]
    assert docstring_rules("Rows.\n\n- " + "word " * 20 + "\n- " + "word " * 20) == []
    assert docstring_rules("Rows:\n\n    " + "word " * 40) == []
    assert docstring_rules("Rows.\n\n" + "rows_B    " + "word " * 20 + "\nmask_B    " + "word " * 20) == []
    comment = "# " + "word " * 14 + "\n# " + "word " * 14
    assert rules('"""Table."""\n' + comment) == ["a sentence has at most 25 words, not 28"]
    message = "word " * 13 + "{x} " * 14
    assert rules(f'"""Table."""\nraise ValueError(f"{message}")') == ["a sentence has at most 25 words, not 27"]
    assert rules(f'"""Table."""\nraise ValueError(f"{message[:65]}; {message[65:]}")') == []
    assert rules(f'"""Table."""\nFlag = Option(help="{"word " * 26}")') == ["a sentence has at most 25 words, not 26"]


@pytest.mark.parametrize("head", ["That is", "Those of", "None of", "What is", "Whoever is", "Who is", "One that is"])
def test_a_sentence_begins_with_its_noun(head):
    assert docstring_rules(f"Table. {head} here.") == ["a sentence begins with its noun"]


def test_a_question_may_begin_with_its_pronoun_and_a_legend_of_shapes_may_be_long():
    assert docstring_rules("Table.\n\nWhat is in it?\n\nShape letters: " + "B rows, " * 20) == []


def test_one_may_count_a_noun_and_none_be_a_value():
    assert docstring_rules("Table. One forward of the decoder. `None`: no limit.") == []


def test_code_abbreviations_and_decimals_end_no_sentence():
    assert sentences("It takes 1.5 ms, e.g. A100 vs. H100. `a. B` is next. Done?") == [
        "It takes 1.5 ms, e.g. A100 vs. H100.", "Code is next.", "Done?",
    ]  # fmt: skip
    assert word_count("A - of `b` ([c] = 2):") == 5


def test_blocks_are_paragraphs_items_entries_and_literals():
    text = "First\nline.\n\n- item\n  goes on\n- other\n\nname_B   meaning\n         goes on\n\n    literal  tree\n"
    assert [(block.line, block.text, block.kind) for block in blocks(text, 1)] == [
        (1, "First line.", "prose"), (4, "item goes on", "prose"), (6, "other", "prose"),
        (8, "meaning goes on", "entry"), (11, "literal  tree", "literal"),
    ]  # fmt: skip


def test_public_names_need_docstrings_and_private_or_inherited_ones_do_not():
    text = '"""Table."""\nclass Open:\n    """Table."""\n    def read(self): ...\ndef _f(): ...\n'
    assert [problem.text for problem in python_problems(text)] == ["read"]
    assert python_problems(text, complete=False) == []
    assert rules(text.replace("read", "__len__")) == []
    assert rules('"""Table."""\nclass Open(Base):\n    """Table."""\n    def read(self): ...\n') == []
    assert rules("") == ["a module has a docstring"]


def test_documents_wrap_at_120_characters_but_for_tables_links_and_code_blocks():
    line = "word " * 24 + "."
    assert [problem.rule for problem in document_problems(line)] == ["a line has at most 120 characters"]
    assert document_problems(f"| {line} | b |\n[{line}](x.md)\n") == []
    assert document_problems("```\n" + "asks " * 20 + "\n```\n") == []
