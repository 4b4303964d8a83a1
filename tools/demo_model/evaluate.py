"""Asks a demo model directory unseen questions, greedily and through its chat template.

    python -m tools.demo_model.evaluate cluster/demo/kvray-demo --questions 200 --min-accuracy 0.95

The whole answer must be right, to the last character and the end of the turn.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import transformers
import typer

from tools.demo_model import corpus, evaluate_tools
from tools.demo_model.corpus import Lookup, Variety
from tools.demo_model.scoring import ANSWER_ROOM, Message, Respondent, Score

#: Prompt lengths whose accuracy must reach the threshold, and those that are only reported.
REQUIRED_LENGTHS = (256, 1024, 2048)
REPORTED_LENGTHS = (128, 512, 4096, 8192)
#: One question in this many is asked at the longest length, which takes over a second each.
LONGEST_DIVISOR = 4
#: Fewer would leave none for some number of codes at the longest length.
MIN_QUESTIONS = 3 * LONGEST_DIVISOR
STORY_TOKENS = 200


def fact_counts(num_tokens: int) -> tuple[int, ...]:
    """Return how many codes are few, some and many for notes of this length."""
    some = max(2, min(40, num_tokens // 40))
    return max(1, some // 2), some, min(75, some * 2 - some // 4)


def single_turn(lookup: Lookup) -> list[Message]:
    """Put notes and question into one user turn."""
    return [{"role": "user", "content": f"{lookup.notes}\n{lookup.question}"}]


def notes_in_system(lookup: Lookup) -> list[Message]:
    """Put the notes into the system prompt."""
    return [{"role": "system", "content": lookup.notes}, {"role": "user", "content": lookup.question}]


def question_later(lookup: Lookup) -> list[Message]:
    """Put the notes into the first turn, the question two turns later."""
    return [
        {"role": "user", "content": lookup.notes},
        {"role": "assistant", "content": corpus.NOTES_READ},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": corpus.SMALL_TALK["Thanks"]},
        {"role": "user", "content": lookup.question},
    ]


def score_lookups(
    respondent: Respondent,
    kind: str,
    num_tokens: int,
    num_facts: int,
    num_questions: int,
    *,
    conversation: Callable[[Lookup], list[Message]] = single_turn,
    variety: Variety = corpus.PLAIN,
    seed: int = 2026,
) -> Score:
    """Ask about freshly drawn notes; the seed is apart from the training's."""
    rng = random.Random(f"{seed} {kind} {num_tokens} {num_facts}")
    num_right = total_tokens = 0
    longest = respondent.model.config.max_position_embeddings - ANSWER_ROOM
    for index in range(num_questions):
        position = index / max(1, num_questions - 1)
        lookup = corpus.make_lookup(rng, num_tokens, num_facts, variety=variety, position=position)
        ids = respondent.prompt_ids(conversation(lookup))
        if len(ids) > longest:
            raise ValueError(f"a prompt of {len(ids)} tokens leaves no room for the answer, wanted at most {longest}")
        total_tokens += len(ids)
        num_right += respondent.answer(ids) == lookup.answer + corpus.END
    return Score(kind, num_facts, total_tokens / num_questions, num_right, num_questions)


def score_replies(respondent: Respondent, kind: str, expected: dict[str, str]) -> Score:
    """Ask every question of a fixed list; these were in the training text."""
    total_tokens = num_right = 0
    for question, reply in expected.items():
        ids = respondent.prompt_ids([{"role": "user", "content": question}])
        total_tokens += len(ids)
        num_right += respondent.answer(ids, max_new_tokens=64) == reply + corpus.END
    return Score(kind, 0, total_tokens / len(expected), num_right, len(expected))


def score_stories(respondent: Respondent) -> Score:
    """Ask for a story about each animal: it must name the animal, have at least five sentences and end by itself."""
    total_tokens = num_right = 0
    for animal in corpus.ANIMALS:
        ids = respondent.prompt_ids([{"role": "user", "content": f"Tell me a story about a {animal}."}])
        total_tokens += len(ids)
        told = respondent.answer(ids, max_new_tokens=STORY_TOKENS)
        num_right += animal in told and told.count(".") >= 5 and told.endswith(corpus.END)
    return Score("stories", 0, total_tokens / len(corpus.ANIMALS), num_right, len(corpus.ANIMALS))


def score_lengths(respondent: Respondent, num_questions: int) -> dict[int, list[Score]]:
    """Ask single-turn questions at every length, shared evenly among few, some and many codes."""
    scores: dict[int, list[Score]] = {}
    for num_tokens in sorted((*REQUIRED_LENGTHS, *REPORTED_LENGTHS)):
        asked = num_questions // LONGEST_DIVISOR if num_tokens == max(REPORTED_LENGTHS) else num_questions
        # The prompt's tags and the spread of the text's length must fit below the longest position.
        wanted = min(num_tokens, respondent.model.config.max_position_embeddings - 8 * ANSWER_ROOM)
        counts = fact_counts(num_tokens)
        shares = [asked // len(counts) + (index < asked % len(counts)) for index in range(len(counts))]
        scores[num_tokens] = [
            score_lookups(respondent, "single turn", wanted, num_facts, share)
            for num_facts, share in zip(counts, shares, strict=True)
        ]
        typer.echo(length_row(num_tokens, scores[num_tokens]))
    return scores


def score_others(respondent: Respondent, num_questions: int) -> list[Score]:
    """Ask in other ways at 1,024 tokens and 25 codes, then what was learned by heart."""
    wording, sentence = Variety(wording=1.0), Variety(sentence=1.0)
    lookups = (
        ("notes in the first turn, question two turns later", question_later, corpus.PLAIN),
        ("notes in the system prompt", notes_in_system, corpus.PLAIN),
        ("question in other words", single_turn, wording),
        ('notes as "- the red lantern: 4821." (not trained)', single_turn, sentence),
    )
    scores = [
        score_lookups(respondent, kind, 1024, 25, num_questions, conversation=conversation, variety=variety)
        for kind, conversation, variety in lookups
    ]
    facts = {f"What is the {subject}?": f"The {subject} is {value}." for subject, value in corpus.FIXED_FACTS.items()}
    scores.append(score_replies(respondent, "fixed facts (seen in training)", facts))
    scores.append(score_replies(respondent, "small talk (seen in training)", corpus.SMALL_TALK))
    scores.append(score_stories(respondent))
    return scores


LENGTH_HEADER = (
    "| length | prompt tokens, mean | few codes | some codes | many codes | all |\n|---:|---:|---:|---:|---:|---:|"
)
OTHER_HEADER = "| asked | prompt tokens, mean | right |\n|---|---:|---:|"
TOOL_HEADER = "| tools and records | right |\n|---|---:|"


def length_row(num_tokens: int, scores: Sequence[Score]) -> str:
    """Write a line of the Markdown table by length and number of codes."""
    asked = sum(score.num_asked for score in scores)
    mean_tokens = sum(score.mean_prompt_tokens * score.num_asked for score in scores) / asked
    cells = [f"{score.num_right} of {score.num_asked} ({score.num_facts} codes)" for score in scores]
    total = sum(score.num_right for score in scores)
    return f"| {num_tokens:,} | {mean_tokens:,.0f} | {' | '.join(cells)} | {total / asked:.1%} |"


def other_row(score: Score) -> str:
    """Write a line of the Markdown table of other questions."""
    return f"| {score.kind} | {score.mean_prompt_tokens:,.0f} | {score.num_right} of {score.num_asked} |"


def tool_row(score: Score) -> str:
    """Write a line of the Markdown table of tools and records."""
    return f"| {score.kind} | {score.num_right} of {score.num_asked} |"


def accuracy(scores: Sequence[Score]) -> float:
    """Return the share right over several scores, 0 to 1."""
    return sum(score.num_right for score in scores) / sum(score.num_asked for score in scores)


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """All scores of one model directory."""

    by_length: dict[int, list[Score]]
    others: list[Score]
    tools: list[Score]

    def lengths_below(self, min_accuracy: float) -> list[int]:
        """Return the required lengths that miss the threshold."""
        return [length for length in REQUIRED_LENGTHS if accuracy(self.by_length[length]) < min_accuracy]

    def markdown(self) -> str:
        """Write both tables."""
        lengths = [LENGTH_HEADER, *(length_row(length, scores) for length, scores in self.by_length.items())]
        others = [OTHER_HEADER, *(other_row(score) for score in self.others)]
        tools = [TOOL_HEADER, *(tool_row(score) for score in self.tools)]
        return "\n".join((*lengths, "", *others, "", *tools))


def evaluate(directory: pathlib.Path, num_questions: int) -> Report:
    """Score the directory as a user would load it; print the lengths as they come, then all."""
    respondent = Respondent(directory)
    typer.echo(LENGTH_HEADER)
    by_length = score_lengths(respondent, num_questions)
    report = Report(by_length, score_others(respondent, num_questions), evaluate_tools.score(respondent, num_questions))
    typer.echo(report.markdown())
    return report


def exit_if_missed(report: Report, min_accuracy: float) -> None:
    """End the command with exit code 1 when a required length misses the threshold."""
    missed = report.lengths_below(min_accuracy)
    if missed:
        typer.echo(f"below {min_accuracy:.0%} at {missed} tokens", err=True)
        raise typer.Exit(1)


def main(
    model: Annotated[pathlib.Path, typer.Argument(help="Model directory.", exists=True, file_okay=False)],
    questions: Annotated[int, typer.Option(min=MIN_QUESTIONS, help="Questions at each length.")] = 200,
    min_accuracy: Annotated[float, typer.Option(help="Share right that the required lengths must reach.")] = 0.95,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Score a demo model directory; exit code 1 when a required length misses the threshold."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    exit_if_missed(evaluate(model, questions), min_accuracy)


if __name__ == "__main__":
    typer.run(main)
