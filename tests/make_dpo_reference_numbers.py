"""Make the numbers again that tests/test_DPO_helper.py compares with: `dpo_reference_numbers.json` beside this file.

    uv run --isolated --no-project --python 3.11 --with trl==1.16.0 --with mpmath \
        python tests/make_dpo_reference_numbers.py

TRL is in an environment of its own, as this project does not depend on it. Its DPOTrainer gets pairs as text, a tiny
model in float64 and, as reference, the same model a little moved. It tokenizes, appends EOS, scores, and computes loss
and gradient by itself. Its log-probs are float32 even then, so that the numbers agree to 1e-6.

    pairs       token ids, EOS included, as its collator made them
    cases       for each beta: loss, log-probs of policy and reference, metrics, and the gradient of all weights
"""

import importlib.metadata
import json
import random
import tempfile
from pathlib import Path

import torch
from make_reference_numbers import EOS, VOCABULARY, _rows, describe, make_model, save_model
from transformers import LlamaForCausalLM

PATH = Path(__file__).with_name("dpo_reference_numbers.json")
BETAS = (0.1, 0.5, 3.0)
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def make_pairs() -> list[dict[str, list[int]]]:
    """Return ragged pairs. Two have the same prompt, and one pair of responses shares its first tokens."""
    generator = random.Random(1)

    def draw(length: int) -> list[int]:
        words = [index for index in range(2, VOCABULARY) if not f"t{index}".startswith(f"t{EOS}")]  # EOS is cut out
        return [generator.choice(words) for _ in range(length)]

    lengths = [(3, 2, 5), (3, 4, 1), (1, 6, 6), (5, 3, 7)]
    pairs = [{"prompt": draw(p), "chosen": draw(c), "rejected": draw(r)} for p, c, r in lengths]
    pairs[1]["prompt"] = pairs[0]["prompt"]
    pairs[2]["rejected"][:3] = pairs[2]["chosen"][:3]
    return pairs


def make_reference() -> LlamaForCausalLM:
    """Return the tiny model with every weight moved a little."""
    model, generator = make_model(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def case_of(beta: float, folder: str) -> dict:
    """Return what TRL's trainer computes on all pairs as one batch."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [{name: "".join(f"t{i} " for i in ids) for name, ids in pair.items()} for pair in make_pairs()]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    arguments = DPOConfig(
        output_dir=folder + "/out",
        beta=beta,
        per_device_train_batch_size=len(rows),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        max_length=None,
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=make_reference(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    collated = trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, collated)
    loss.backward()
    ids, mask = collated["input_ids"], collated["completion_mask"]
    attended = collated["attention_mask"].bool()
    sequences = [row[keep].tolist() for row, keep in zip(ids, attended, strict=True)]
    num_responses = mask.sum(1).tolist()
    pairs = []
    for index in range(len(rows)):
        both = [index, index + len(rows)]
        responses = [sequences[row][-num_responses[row] :] for row in both]
        prompt = sequences[index][: -num_responses[index]]
        assert all(response[-1] == EOS for response in responses)
        pairs.append({"prompt": prompt, "chosen": responses[0], "rejected": responses[1]})
    metrics = {name: trainer._metrics["train"][name][0] for name in METRICS}
    gradient = describe({name: part.grad for name, part in trainer.model.named_parameters()})
    return {"pairs": pairs, "case": {"beta": beta, "loss": loss.item(), "metrics": metrics, "gradient": gradient}}


def main() -> None:
    """Write the file."""
    torch.set_default_dtype(torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        found = [case_of(beta, folder) for beta in BETAS]
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    result = {"made_by": "tests/make_dpo_reference_numbers.py", "versions": versions, "pairs": found[0]["pairs"]}
    result["cases"] = [one["case"] for one in found]
    PATH.write_text("{\n" + ",\n".join(f"{json.dumps(key)}: {_rows(value)}" for key, value in result.items()) + "\n}\n")
    print(f"wrote {len(found)} cases to {PATH}")


if __name__ == "__main__":
    main()
