"""Small tasks for lm-eval in local files: multiple choice, generation, perplexity."""

import json
import random
from pathlib import Path

WORDS = "the cat and hat sat on a mat what is this that user or system dog ran to see it".split()


def make_tasks(directory: Path, number: int = 200) -> dict[str, str]:
    """Writes the tasks' data and YAML files. Returns name -> path: `choose`, `write`, `read`.

    Of the questions every tenth is longer than 64 tokens of the tests' tokenizer, and so are some of the texts.
    """
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    rows = [
        {
            "question": text(40, 60) if i % 10 == 0 else text(1, 8) + " " * (i % 3 == 1),
            # No two alike: between those rounding would decide
            "choices": [f" {word}{f' {text(1, 3)}' * (i % 2)}" for word in draw.sample(WORDS, 2 + i % 3)],
            "gold": draw.randint(0, 1),
            "answer": text(1, 2),
            "text": text(60, 90) if i % 20 == 0 else text(2, 12),
        }
        for i in range(number)
    ]
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {directory / 'cache'}}}",
        "test_split: test",
    ]
    tasks = {
        "choose": [
            "output_type: multiple_choice",
            "doc_to_text: question",
            "doc_to_choice: choices",
            "doc_to_target: gold",
            "metric_list: [{metric: acc}, {metric: acc_norm}]",
        ],
        "write": [
            "output_type: generate_until",
            "doc_to_text: question",
            "doc_to_target: answer",
            "generation_kwargs: {until: ['c', '<|eot_id|>'], max_gen_toks: 12}",
            "metric_list: [{metric: exact_match}]",
        ],
        "read": [
            "output_type: loglikelihood_rolling",
            "doc_to_text: ''",
            "doc_to_target: text",
            "metric_list: [{metric: word_perplexity}]",
        ],
    }
    paths = {}
    for name, lines in tasks.items():
        path = directory / f"{name}.yaml"
        path.write_text("\n".join([f"task: local_{name}", *common, *lines, "metadata: {version: 1}"]) + "\n")
        paths[name] = str(path)
    return paths
