"""Which tokens a row becomes, and which of them carry loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from splitfl.data.examples import Example
from splitfl.data.records import IGNORE, Encoded, Record, encode_example
from splitfl.errors import DataError

BOS, EOS = 0, 1
QUESTION = {"role": "user", "content": "a cough"}
ANSWER = {"role": "assistant", "content": "\nthe fever"}


def learned(encoded: Encoded, tokenizer: Any) -> str:
    return str(tokenizer.decode(encoded.ids[encoded.loss_mask], skip_special_tokens=False))


def shown(encoded: Encoded, tokenizer: Any) -> str:
    return str(tokenizer.decode(encoded.ids, skip_special_tokens=False))


@pytest.mark.parametrize(
    ("adds", "expected"),
    [("", "cough</s>"), ("bos", "<s>cough</s>"), ("eos", "cough</s>"), ("bos eos", "<s>cough</s>")],
)
@pytest.mark.parametrize("brings", ["cough", "cough</s>"])
def test_text_carries_loss_everywhere_and_ends_once(tokenizer_with: Any, adds: str, expected: str, brings: str) -> None:
    tokenizer = tokenizer_with(adds=adds)
    encoded = encode_example(Example(text=brings), tokenizer)
    assert shown(encoded, tokenizer) == learned(encoded, tokenizer) == expected
    assert encoded.ids.dtype == np.int64


def test_text_that_brings_its_own_beginning_gets_no_second_one(tokenizer_with: Any) -> None:
    tokenizer = tokenizer_with(adds="bos")
    assert shown(encode_example(Example(text="<s>cough"), tokenizer), tokenizer) == "<s>cough</s>"


@pytest.mark.parametrize(("adds", "front"), [("", ""), ("bos", "<s>"), ("bos eos", "<s>")])
def test_response_alone_carries_loss(tokenizer_with: Any, adds: str, front: str) -> None:
    tokenizer = tokenizer_with(adds=adds)
    encoded = encode_example(Example(prompt="the cou", response="gh fever"), tokenizer)
    assert shown(encoded, tokenizer) == f"{front}the cough fever</s>"
    assert learned(encoded, tokenizer) == "gh fever</s>"
    prompt = tokenizer("the cou", add_special_tokens=False)["input_ids"]
    assert encoded.ids[len(front and "x") :][: len(prompt)].tolist() == prompt


def test_prompt_that_brings_an_end_keeps_it(tokenizer: Any) -> None:
    encoded = encode_example(Example(prompt="cough</s>", response="fever"), tokenizer)
    assert shown(encoded, tokenizer) == "cough</s>fever</s>"


def test_assistant_turns_alone_carry_loss(tokenizer: Any) -> None:
    second = {"role": "assistant", "content": "fever"}
    turns = ({"role": "system", "content": "Be brief"}, QUESTION, ANSWER, QUESTION, second, QUESTION)
    encoded = encode_example(Example(messages=turns), tokenizer)
    assert learned(encoded, tokenizer) == "\nthe fever</s>fever</s>"
    whole = (
        "<|system|>Be brief</s><|user|>a cough</s><|assistant|>\nthe fever</s><|user|>a cough</s><|assistant|>fever</s>"
    )
    assert shown(encoded, tokenizer) == whole
    assert encoded.ids.tolist() == tokenizer(whole)["input_ids"]


def test_conversation_without_assistant_carries_no_loss(tokenizer: Any) -> None:
    for turns in ((QUESTION,), (ANSWER, QUESTION)):
        encoded = encode_example(Example(messages=turns), tokenizer)
        assert len(encoded.ids) > 0
        assert not encoded.loss_mask.any()


def test_assistant_that_opens_the_conversation_is_context(tokenizer: Any) -> None:
    greeting = {"role": "assistant", "content": "the the"}
    encoded = encode_example(Example(messages=(greeting, QUESTION, ANSWER)), tokenizer)
    assert learned(encoded, tokenizer) == "\nthe fever</s>"
    assert shown(encoded, tokenizer).startswith("<|assistant|>the the</s>")


def test_conversation_gets_an_end_where_the_template_writes_none(tokenizer_with: Any) -> None:
    tokenizer = tokenizer_with(template="{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}")
    encoded = encode_example(Example(messages=(QUESTION, ANSWER)), tokenizer)
    assert learned(encoded, tokenizer) == "[assistant]\nthe fever</s>"


def test_turn_keeps_its_loss_where_a_token_reaches_across_its_start(tokenizer_with: Any) -> None:
    tokenizer = tokenizer_with(
        template="{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    turns = ({"role": "user", "content": "the cou"}, {"role": "assistant", "content": "gh fever"})
    assert learned(encode_example(Example(messages=turns), tokenizer), tokenizer) == " cough fever</s>"


UNSTABLE = "{{ messages | length }}{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{% endfor %}"
REFUSES = "{% if messages | length > 1 %}{{ raise_exception('SECRET ' ~ messages[0]['content']) }}{% endif %}x"


@pytest.mark.parametrize(
    ("template", "says"), [(None, "no chat template"), (UNSTABLE, "not prefix-stable"), (REFUSES, "refuses")]
)
def test_conversation_is_refused_when_the_template_cannot_carry_it(
    tokenizer_with: Any, template: str | None, says: str
) -> None:
    with pytest.raises(DataError, match=says) as caught:
        encode_example(Example(messages=(QUESTION, ANSWER)), tokenizer_with(template=template))
    assert caught.value.remedy
    assert "cough" not in str(caught.value)


def test_template_that_writes_the_date_gives_the_same_tokens_every_day(tokenizer_with: Any) -> None:
    date = "\n{{ strftime_now('%d %b %Y') + strftime_now(' (%Y-%m-%d)') }}"
    dated = date + "{% for m in messages %}|{{ m['role'] }}|{{ m['content'] }}</s>{% endfor %}"
    tokenizer = tokenizer_with(template=dated)
    encoded = encode_example(Example(messages=(QUESTION, ANSWER)), tokenizer)
    assert shown(encoded, tokenizer).startswith("\n26 Jul 2024 (2024-07-26)|user|")


def test_example_is_cut_on_the_right(tokenizer: Any) -> None:
    whole = encode_example(Example(text="a cough and a fever"), tokenizer)
    cut = encode_example(Example(text="a cough and a fever"), tokenizer, 3)
    assert cut.ids.tolist() == whole.ids[:3].tolist()
    assert len(cut.loss_mask) == 3


def test_tokenizer_without_an_end_is_refused(tokenizer_with: Any) -> None:
    tokenizer = tokenizer_with()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode_example(Example(text="cough"), tokenizer)


def test_record_shifts_labels_onto_the_positions_that_predict_them() -> None:
    record = Record.from_encoded(Encoded(np.array([5, 6, 7, 8]), np.array([True, False, True, True])))
    assert record.labels.tolist() == [IGNORE, 7, 8, IGNORE]
    assert record.label_tokens == 2
    assert len(record) == 4
    assert repr(record) == "Record(4 tokens, 2 with loss)"
