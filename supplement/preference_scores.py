"""Log-probs of preference pairs: the reference's, which are scored once and kept, and those of an evaluation.

The reference is the run's first policy. Its log-probs are numbers that never change, so that no second model is needed:
before the first step every pair is scored, and the scores stay in the run's folder. If they are lost, a resumed run
loads the first policy again and scores it, which gives the same numbers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plainrl.checkpoint import fingerprint, write_durably
from plainrl.distributed import on_first, rank
from plainrl.policy import score_responses
from plainrl.records import Example, Response
from plainrl.run_folder import RunFolder
from plainrl.run_records import read_json_object
from plainrl.supplement_config import DPOConfig
from policy_evaluation import Evaluator
from SFT_helper import pad_token_id
from supplement.DPO_helper import compute_dpo_loss
from supplement.preference_data import TokenizedPair

SCORES = "reference_log_probs.json"
PAIRS_PER_PHASE = 256  # how many pairs are scored under one time limit


class PairScore(NamedTuple):
    """log pi(y_w|x) and log pi(y_l|x) of a pair: sums over the response tokens, in nats."""

    chosen: float
    rejected: float


def score_pairs(
    policy: PreTrainedModel, pairs: Sequence[TokenizedPair], padding_id: int, config: DPOConfig
) -> list[PairScore]:
    """Score pairs with the policy, without gradients."""
    responses = [
        Response(pair.prompt_ids, "", token_ids, [], "stop")
        for pair in pairs
        for token_ids in (pair.chosen_ids, pair.rejected_ids)
    ]
    scores = score_responses(policy, responses, padding_id, config.scoring_batch_size)
    sums = [score["log_probs"].double().sum().item() for score in scores]
    return [PairScore(*two) for two in zip(sums[::2], sums[1::2], strict=True)]


def reference_scores(
    run: RunFolder,
    pairs: Sequence[TokenizedPair],
    padding_id: int,
    config: DPOConfig,
    first_policy: Callable[[], PreTrainedModel],
) -> list[PairScore]:
    """Return the reference's score of each pair: those kept in the run's folder, or new ones, which are kept there.

    A run without a checkpoint begins anew, perhaps with another model, and so scores anew.

    Args:
        run: the run's folder.
        pairs: of the run. Scores of other pairs are not used.
        padding_id: token id that fills rows up.
        config: the run's configuration.
        first_policy: returns the policy that the run begins with. It is called only if scores are needed.
    """
    path = run.path / SCORES
    data = fingerprint((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs)
    kept = on_first(lambda: read_json_object(path) if run.checkpoint else {})
    if kept.get("data") == data:
        return [PairScore(*two) for two in zip(kept["chosen"], kept["rejected"], strict=True)]
    policy, scores = first_policy(), []
    starts = range(0, len(pairs), PAIRS_PER_PHASE)
    for start in tqdm(starts, "reference log-probs", unit=f"{PAIRS_PER_PHASE} pairs", disable=bool(rank())):
        with run.watched("old_log_probs"):
            scores += score_pairs(policy, pairs[start : start + PAIRS_PER_PHASE], padding_id, config)
    columns = {"data": data, "chosen": [s.chosen for s in scores], "rejected": [s.rejected for s in scores]}
    on_first(lambda: write_durably(path, json.dumps(columns)))
    return scores


class PreferenceEvaluator:
    """Measures a policy on held-out pairs and, if there are questions, on its own graded responses to them."""

    def __init__(
        self,
        config: DPOConfig,
        run: RunFolder,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[TokenizedPair],
        references: Sequence[PairScore],
        questions: Sequence[Example],
    ) -> None:
        """Start the engine if there are questions.

        Args:
            config: the run's configuration.
            run: the run's folder.
            tokenizer: the policy's.
            pairs: held-out pairs.
            references: the reference's scores of them.
            questions: what is sampled during training.
        """
        self._config, self._run, self._pairs, self._references = config, run, pairs, references
        self._padding_id = pad_token_id(tokenizer)
        self._sampler = Evaluator(config, run, tokenizer, questions) if questions else None

    def evaluate(self, policy: PreTrainedModel, eval_step: int) -> Mapping[str, Any]:
        """Measure pairs and responses; log `eval/*`, and return the metrics."""
        seconds: dict[str, float] = {}
        with self._run.watched("evaluate", seconds):
            scores = score_pairs(policy, self._pairs, self._padding_id, self._config)
            metrics = summarize_pairs(scores, self._references, self._config.beta)
        metrics["pair_seconds"] = seconds["time/evaluate"]
        self._run.log({"eval_step": eval_step} | {f"eval/{name}": value for name, value in metrics.items()})
        return metrics | (self._sampler.evaluate(policy, eval_step) if self._sampler else {})

    def evaluate_finally(self, policy: PreTrainedModel, num_steps: int, questions: Sequence[Example]) -> None:
        """Sample the questions of the end, if there are any, and log `eval_all/*`."""
        if self._sampler:
            self._sampler.evaluate_finally(policy, num_steps, questions)

    def sleep(self) -> None:
        """Free the engine's memory on a shared GPU until the next evaluation."""
        if self._sampler:
            self._sampler.sleep()


def summarize_pairs(
    scores: Sequence[PairScore], references: Sequence[PairScore], beta: float
) -> dict[str, float | int]:
    """Return the metrics of pairs: means of loss and of the metadata of `compute_dpo_loss`, and of the log-probs."""
    of_policy, of_reference = (torch.tensor(rows, dtype=torch.float64) for rows in (scores, references))
    (chosen, rejected), (reference_chosen, reference_rejected) = of_policy.unbind(1), of_reference.unbind(1)
    losses, metadata = compute_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta)
    means = {"loss": losses, **metadata, "chosen_log_prob": chosen, "rejected_log_prob": rejected}
    return {name: values.mean().item() for name, values in means.items()} | {"num_pairs": len(scores)}
