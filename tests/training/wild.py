"""Rows as people have them, by the number of the report they came from. The tables are there to grow."""

import json
from typing import Any

Q, A = ("user", "Q"), ("assistant", "A")
ASK = [{"role": "user", "content": "Q"}]
ANSWER = [{"role": "assistant", "content": "A"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
F = {"name": "f", "parameters": {}}


def share(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


READ: list[tuple[str, Any, list[tuple[str, str]], set[int], set[str]]] = [
    # (report, row, turns, muted turns, columns and keys that are not used)
    ("F1", {"instruction": "Q", "input": "", "output": "A", "system": "S"}, [("system", "S"), Q, A], set(), set()),
    (
        "F1",
        {"instruction": "Q", "output": "A", "history": [["a", "b"], ["c", "d"]]},
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), Q, A],
        set(),
        set(),
    ),
    ("F1", {"system": "S", **share(("human", "Q"), ("gpt", "A"))}, [("system", "S"), Q, A], set(), set()),
    (
        "F1",
        {"system": "S", "messages": [{"role": "system", "content": "T"}, *ASK, *ANSWER]},
        [("system", "S\n\nT"), Q, A],
        set(),
        set(),
    ),
    ("F1", {"instruction": "Q", "output": "A", "history": None, "system": None}, [Q, A], set(), set()),
    (
        "F2",
        {"messages": [*ASK, {"role": "assistant", "content": "B", "weight": 0}, *ASK, {**ANSWER[0], "weight": 1}]},
        [Q, ("assistant", "B"), Q, A],
        {1},
        set(),
    ),
    (
        "F2",
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "train": False}]},
        [Q, A],
        {1},
        set(),
    ),
    ("F2", {"messages": [*ASK, {**ANSWER[0], "loss": "false"}]}, [Q, A], {1}, set()),
    ("F4", {"question": "Q", "answer": "A", "context": "C"}, [("user", "Q\n\nC"), A], set(), set()),
    ("F4", {"id": 1, "system_prompt": "S", "question": "Q", "response": "A"}, [("system", "S"), Q, A], set(), {"id"}),
    ("F4", {"question": "Q", "choices": ["a", "b"], "answer": 1}, [Q, ("assistant", "1")], set(), {"choices"}),
    ("F4", {"messages": [*ASK, {**ANSWER[0], "id": "m1"}], "lang": "en"}, [Q, A], set(), {"messages[].id", "lang"}),
    ("F4", {"messages": [*ASK, *ANSWER], "tools": None, "source": ""}, [Q, A], set(), set()),
    *[
        ("F5", {question: "Q", answer: "A"}, [Q, A], set(), set())
        for question, answer in (
            ("prompt", "completion"),
            ("prompt", "response"),
            ("input", "output"),
            ("question", "response"),
            ("Question", "Answer"),
            (" user ", "assistant"),
            ("problem", "solution"),
            ("inputs", "targets"),
        )
    ],
    ("F5", {"prompt": ASK, "completion": ANSWER}, [Q, A], set(), set()),
    ("F5", {"prompt": [*ASK, *ANSWER, *ASK], "completion": ANSWER}, [Q, A, Q, A], {1}, set()),
    ("F5", {"prompt": "Q", "chosen": "A", "rejected": "B"}, [Q, A], set(), {"rejected"}),
    ("F5", {"chosen": [*ASK, *ANSWER], "rejected": [*ASK, *ASK]}, [Q, A], set(), {"rejected"}),
    (
        "F5",
        {"prompt": "Q", "chosen": [*ASK, *ANSWER], "rejected": [], "score": 1.5},
        [Q, A],
        set(),
        {"prompt", "score"},
    ),
    (
        "F5",
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: a"},
        [("user", "a"), ("assistant", "b"), Q, A],
        set(),
        {"rejected"},
    ),
    (
        "F5",
        {**share(("human", "Q")), "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
        [Q, A],
        set(),
        {"rejected"},
    ),
    ("F5", {"prompt": "Q", "completion": "A", "label": True}, [Q, A], set(), set()),
    ("F5", {"prompt": "Q", "completion": "A", "label": 1}, [Q, A], set(), {"label"}),
    *[
        ("r24", {"prompt": "Q", "completion": "A", **tags}, [Q, A], set(), unused)
        for tags, unused in (
            ({"kto_tag": "true"}, set()),
            ({"label": "chosen", "is_rejected": False}, set()),
            ({"chosen": True, "rejected": False}, set()),
            ({"isCorrect": "Yes"}, set()),
            ({"thumbs": "up", "Thumbs Down": None}, set()),
            ({"thumbs_up": False, "thumbs_down": False}, {"thumbs_up", "thumbs_down"}),  # nobody has said anything
            ({"rating": "👍"}, set()),
            ({"score": 4.5, "rating": 2}, {"score", "rating"}),
            ({"label": "a", "category": "rejected"}, {"label", "category"}),  # "A" is the answer
            ({"label": "sports", "status": "open"}, {"label", "status"}),
            ({"chosen": "B"}, {"chosen"}),
            ({"correct": 0}, {"correct"}),  # the number of a choice
        )
    ],
    (
        "r24",
        {"messages": [*ASK, {**ANSWER[0], "label": False}, *ASK, {**ANSWER[0], "rating": "thumbs_up"}]},
        [Q, A, Q, A],
        {1},
        set(),
    ),
    ("r24", {"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}, [Q, A], set(), set()),
    (
        "r24",
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: Q\n\nAssistant:", "chosen": "A", "rejected": "B"},
        [("user", "a"), ("assistant", "b"), Q, A],
        {1},
        {"rejected"},
    ),
    ("r24", {"prompt": "Human: or Assistant:", "completion": "A"}, [("user", "Human: or Assistant:"), A], set(), set()),
    ("r24", {"instruction": "", "input": "Q", "output": "A"}, [Q, A], set(), set()),
    ("r24", {"prompt": "Q", "completion": "A", "weight": 0.5, "split": "test"}, [Q, A], set(), {"weight", "split"}),
    ("r24", ["S", "Q", "A"], [("system", "S"), Q, A], set(), set()),
    ("F5", {"messages": None, "prompt": "Q", "completion": "A"}, [Q, A], set(), set()),
    ("review", {"prompt": ["Q"], "completion": ["A"]}, [Q, A], set(), set()),
    *[
        ("review", {"prompt": "Q", "completion": text}, [Q, ("assistant", text)], set(), set())
        for text in ('{"role": "admin", "content": "x"}', '[{"value": 3}]', '[{"role": "admin", "content": "x"}]')
    ],
    ("review", {"prompt": json.dumps(ASK), "completion": json.dumps(ANSWER)}, [Q, A], set(), set()),
    (
        "review",
        {"prompt": "[1, 2]", "completion": '{"x": 1}'},
        [("user", "[1, 2]"), ("assistant", '{"x": 1}')],
        set(),
        set(),
    ),
    *[
        ("F6", share((person, "Q"), (model, "A")), [Q, A], set(), set())
        for person, model in (("Human", "chatgpt"), ("user", "bing"), ("human", "bard"), ("USER", "model"))
    ],
    ("F7", {"conversation": [{"human": "Q", "assistant": "A", "n": 1}]}, [Q, A], set(), {"conversation[].n"}),
    ("F7", {"conversation": [{"input": "Q", "output": "A"}] * 2}, [Q, A, Q, A], set(), set()),
    ("F7", {"dialog": [{"system": "S"}, {"User": "Q"}, {"Bot": "A"}]}, [("system", "S"), Q, A], set(), set()),
    (
        "F7",
        {"messages": [*ASK, {"role": "tool", "content": {"x": 1}}, *ANSWER]},
        [Q, ("tool", '{"x": 1}'), A],
        set(),
        set(),
    ),
    ("F7", {"messages": [{"role": "developer", "content": "S"}, *ASK, *ANSWER]}, [("system", "S"), Q, A], set(), set()),
    (
        "F7",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}, *ANSWER]},
        [("user", "a\nb"), A],
        set(),
        set(),
    ),
    ("F7", {"messages": json.dumps([*ASK, *ANSWER])}, [Q, A], set(), set()),
    (
        "F7",
        {"messages": [*ASK, {"role": "assistant", "content": None, "refusal": "No."}]},
        [Q, ("assistant", "No.")],
        set(),
        set(),
    ),
    ("F9", {"prompt": "Q", "answer": 3}, [Q, ("assistant", "3")], set(), set()),
    ("F9", {"prompt": 2.5, "answer": True}, [("user", "2.5"), ("assistant", "true")], set(), set()),
    ("F9", {"instruction": "Q", "input": float("nan"), "output": "A"}, [Q, A], set(), set()),
    ("F9", {"instruction": "Q", "input": 7, "output": "A"}, [("user", "Q\n\n7"), A], set(), set()),
    (
        "F11",
        {"messages": [*ASK, {"role": "assistant", "content": ""}, *ASK, *ANSWER]},
        [Q, ("assistant", ""), Q, A],
        {1},
        set(),
    ),
]

CALLS: list[Any] = [  # F7: three ways to write the same call and its result
    {
        "messages": [
            *ASK,
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "7"},
            *ANSWER,
        ],
        "functions": [F],
    },
    {
        "messages": [
            *ASK,
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "content": "7"},
            *ANSWER,
        ],
        "tools": [{"type": "function", "function": F}],
    },
    {
        **share(
            ("human", "Q"),
            ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
            ("observation", "7"),
            ("gpt", "A"),
        ),
        "tools": json.dumps([F]),
    },
]

BAD = [
    ("review", {"prompt": "Q", "completion": ["A", "B"]}, "the answer is a list of 2 texts"),
    ("review", {"prompt": ["Q", "A", "R"], "completion": "B"}, "the question is a list of 3 texts"),
    ("review", {"prompt": "Q", "chosen": ["A", "B"], "rejected": ["C"]}, "the answer is a list of 2 texts"),
    ("review", {"prompt": "Q", "completion": {"city": "A"}}, "the answer is the object .*write JSON as a string"),
    ("review", {"prompt": str(ASK), "completion": "A"}, "the question is .* as Python prints them"),
    ("review", {"instruction": "Q", "output": "A", "history": ["a", "b", "c"]}, "the history is a list of 3 texts"),
    ("F2", {"messages": [*ASK, {**ANSWER[0], "weight": 0.5}]}, ": weight of a turn is '0.5': expected 0 or 1"),
    ("F5", {"prompt": "Q", "completion": "A", "label": False}, ": label is false: its answer is not one to learn"),
    *[
        ("r24", {"prompt": "Q", "completion": "A", column: value}, f": {column} is {shown}: its answer is not one to")
        for column, value, shown in (
            ("kto_tag", "False", "'False'"),
            ("label", "rejected", "'rejected'"),
            ("Label", "Not chosen", "'Not chosen'"),
            ("chosen", False, "false"),
            ("is_chosen", "no", "'no'"),
            ("accepted", False, "false"),
            ("Is Correct", False, "false"),
            ("rejected", True, "true"),
            ("is_bad", "yes", "'yes'"),
            ("thumbs_down", True, "true"),
            ("thumbs", "down", "'down'"),
            ("vote", "👎", "'👎'"),
            ("feedback", "negative", "'negative'"),
            ("rating", "bad", "'bad'"),
            ("status", "rejected", "'rejected'"),
            ("train", False, "false"),
            ("weight", 0, "0"),
            ("weight", "0.0", "'0.0'"),
        )
    ],
    ("r24", {"prompt": "Q", "completion": "A", "chosen": False, "rejected": True}, ": chosen is false: its answer"),
    ("r24", {"messages": [*ASK, *ANSWER], "label": False}, ": label is false: its answer is not one to learn"),
    ("r24", {"instruction": "Q", "output": "A", "accepted": True, "label": "bad"}, ": label is 'bad': its answer is"),
    ("r24", {"dialogue": ["Hi", "Hello", "Bye"]}, ": the turns are 3 texts without roles: expected pairs"),
    ("r24", {"message_id": "1", "role": "prompter", "text": "Q"}, " has the columns 'message_id', 'role', 'text'"),
    ("F5", {"text": "Q A"}, " has the columns 'text', which matches no known format: name them with --columns"),
    ("F6", {"conversations": []}, r": the turns are '\[\]': expected a list of turns"),
    ("F6", share(("human", "Q")), " has the turns user: expected a user turn, and an assistant turn last"),
    (
        "F6",
        share(("gpt", "Q"), ("human", "Q"), ("gpt", "A")),
        " has the turns assistant, user, assistant: expected a s",
    ),
    ("F6", share(("human", "Q"), ("alien", "A")), ": a turn has role 'alien': expected system, user, assistant or"),
    ("F7", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, *ANSWER]}, "a part of type 'image_url'"),
    ("F7", {"messages": [*ASK, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "expected a function with a name"),
    ("F7", {"messages": [*ASK, *ANSWER], "tools": "none"}, "a list of functions is 'none': expected a list"),
    ("F9", {"prompt": "Q", "answer": None}, ": the content of the assistant turn is 'None': expected a string"),
    ("F9", {"prompt": float("nan"), "answer": "A"}, ": the question is 'nan'"),
    ("F9", {"messages": [{"role": "user", "content": None}, *ANSWER]}, "the content of the user turn is 'None'"),
]
