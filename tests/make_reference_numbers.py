"""Make the numbers again that tests/test_objective.py compares with: `reference_numbers.json` beside this file.

    uv run --isolated --no-project --python 3.11 --with trl==1.16.0 --with mpmath python tests/make_reference_numbers.py

TRL is in an environment of its own, as this project does not depend on it. Its version stands in the file.

    losses      the loss of made-up log-probs and its gradient by each, in float64
    advantages  from rewards
    steps       one optimizer step on fixed rollouts of a tiny model: the gradient, and the change of the weights

Two sources, and neither is ours:

    TRL         its GRPOTrainer. It gets fixed rollouts, and for `losses` fixed log-probs, and does all the rest itself.
    equations   loops over tokens, written from the papers' equations with 50 digits. Gradients are differences, in
                which what a stop-gradient holds is a constant. These are also the forms of verl and open-instruct.

Differences by definition, which no case here has, each with its reason:

    groups of equal rewards     exactly zero here, since such a group teaches nothing and is skipped; TRL leaves
                                rounding, divided by its eps
    advantage_eps               1e-6 here, which is the assignment's; TRL's is 1e-4; the cases take it over
    REINFORCE in TRL            the ratio, which is 1 on-policy: the same gradient, another value. Ours is the
                                assignment's loss. Of `losses` only the cases with a ratio come from TRL; `steps`
                                compare gradients
    k3 in TRL                   times the ratio by default (DeepSeek-V3.2), for the gradient of the reverse KL; here k2
                                has that on-policy, without a ratio. The cases turn it off
    dapo and cispo in TRL       divide by the tokens of the generation batch, so that all its steps weigh the same; here
                                by those of the optimizer step, so that a step is a mean. The cases have one step for
                                each batch
    entropy bonus in TRL        the mean over all tokens, whatever the loss; here the length normalization of the loss,
                                so that one divisor holds for all terms. The cases have token_mean, where both agree
    sequence ratio in TRL       one number per response. With token weights of the engine correction it has each token's
                                gradient weighted with their mean; here each has its own, as in verl, because a weight
                                corrects the token that it belongs to. TRL also refuses no sum over tokens, but then
                                counts no row; the cases have masked_mean and token_mean
    first tokens                TRL has no `sampling_min_tokens`, which the assignment asks for; its cases have 0
    log-ratio beyond 20         clamped here and in verl, as exp overflows beyond 88 in float32; TRL has infinite ratios
    k3 in verl                  clamped to +-10 in value; here the log-ratio is, as everywhere, so that one limit holds
    std in open-instruct        the population's; here and in TRL the sample's, as in the assignment's snapshots
    dual clip in verl           always on, c = 3; here off by default, as the assignment has none
    CISPO in verl               has a floor as well, and its cap is added to 1; here as in ScaleRL, the cap alone
"""

import importlib.metadata
import json
import math
import os
import random
import tempfile
from pathlib import Path

# Before the imports: at its end, a process without network would wait for minutes to report that it ran.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PATH = Path(__file__).with_name("reference_numbers.json")
NUM_ROWS, GROUP_SIZE, LONGEST, EPS = 8, 4, 7, 1e-4
VOCABULARY, EOS = 32, 1
NUM_DIRECTIONS = 3

# Keys of GRPOConfig. `off_policy` says whether the old log-probs are the policy's own, a little earlier.
CLIP = {"loss_type": "grpo_clip", "off_policy": True}
DUAL = CLIP | {"cliprange_high": 0.28, "cliprange_dual": 1.5}
GSPO = CLIP | {"ratio_level": "sequence", "cliprange": 0.03, "cliprange_high": 0.04}
GSPO_LOW = GSPO | {"cliprange": 0.02, "cliprange_high": 0.1}  # a response lies below, and one between 1 and 1.1
CISPO = {"loss_type": "cispo", "off_policy": True, "ratio_cap": 1.2, "length_normalization": "token_mean"}
ON_POLICY = {"loss_type": "grpo_clip"}  # the ratio is 1
REINFORCE = {"loss_type": "reinforce_with_baseline"}
TRUNCATE = {"engine_correction": "token_truncate", "engine_correction_cap": 1.2}
MASK = {"engine_correction": "token_mask", "engine_correction_cap": 1.3}
SEQUENCE = {"engine_correction": "sequence_mask", "engine_correction_cap": 1.3}
SEQUENCE_CUT = {"engine_correction": "sequence_truncate", "engine_correction_cap": 1.3}
MEAN_MASK = {"engine_correction": "sequence_mean_mask", "engine_correction_cap": 1.05}
FORCED = {"sampling_min_tokens": 2}
TOKEN_MEAN, LONGEST_SUM = {"length_normalization": "token_mean"}, {"length_normalization": "masked_normalize"}
KL = {f"k{n}": {"kl_coefficient": 0.3, "kl_estimator": f"k{n}"} for n in (1, 2, 3)}
ENTROPY = {"entropy_coefficient": 0.05}

OF_TRL = [
    CLIP,
    CLIP | TOKEN_MEAN,
    CLIP | LONGEST_SUM,
    CLIP | {"cliprange_high": 0.28},
    DUAL,
    DUAL | TOKEN_MEAN,
    GSPO,
    GSPO_LOW,
    GSPO | SEQUENCE,
    CISPO,
    CISPO | TRUNCATE,
    CISPO | {"ratio_level": "sequence", "ratio_cap": 1.1},
    ON_POLICY,
    ON_POLICY | TRUNCATE,
    ON_POLICY | MASK | TOKEN_MEAN,
    ON_POLICY | SEQUENCE,
    ON_POLICY | SEQUENCE_CUT,
    CLIP | SEQUENCE_CUT | TOKEN_MEAN,
    CLIP | TRUNCATE,
    CLIP | MASK,
    DUAL | SEQUENCE | TOKEN_MEAN,
    CLIP | KL["k3"],
    ON_POLICY | KL["k3"] | TRUNCATE | LONGEST_SUM,
    CLIP | TOKEN_MEAN | ENTROPY,
    CISPO | KL["k3"] | ENTROPY | MASK,
    CLIP | {"use_std_normalization": False},
    CLIP | {"use_std_normalization": "batch"},
]
OF_EQUATIONS = [
    *OF_TRL,
    REINFORCE,
    REINFORCE | MASK | TOKEN_MEAN,
    {"loss_type": "no_baseline"},
    {"loss_type": "grpo_no_clip", "off_policy": True},
    {"loss_type": "grpo_no_clip", "off_policy": True, "ratio_level": "sequence"} | TOKEN_MEAN,
    GSPO | {"cliprange_dual": 1.02} | LONGEST_SUM,
    GSPO | TRUNCATE | FORCED,
    GSPO | MASK | FORCED | TOKEN_MEAN,
    GSPO | MEAN_MASK,
    CLIP | TRUNCATE | FORCED,
    CLIP | MASK | FORCED,
    CLIP | SEQUENCE | FORCED,
    CLIP | SEQUENCE_CUT | FORCED,
    CLIP | MEAN_MASK | FORCED,
    REINFORCE | MEAN_MASK | KL["k2"],
    CISPO | SEQUENCE | FORCED | KL["k2"],
    CLIP | KL["k1"],
    CLIP | KL["k2"] | LONGEST_SUM,
    DUAL | KL["k3"] | ENTROPY | MASK | FORCED,
    {"loss_type": "no_baseline"} | KL["k2"] | SEQUENCE,
    CLIP | {"use_std_normalization": "mean"},
]
SCALES = (True, False, "batch", "mean")
OF_STEPS = [
    REINFORCE,
    REINFORCE | {"sampling_temperature": 0.7},
    REINFORCE | LONGEST_SUM | {"use_std_normalization": False},
    REINFORCE | TOKEN_MEAN | {"use_std_normalization": "batch"},
    REINFORCE | {"mask_truncated_responses": True},
    REINFORCE | TRUNCATE,
    REINFORCE | MASK | TOKEN_MEAN,
    REINFORCE | SEQUENCE,
    CLIP,
    CLIP | TOKEN_MEAN | {"cliprange_high": 0.28},
    DUAL | TRUNCATE,
    GSPO,
    GSPO | SEQUENCE,
    CISPO,
    CISPO | MASK,
    CLIP | KL["k3"],
    CLIP | TOKEN_MEAN | ENTROPY,
    CISPO | KL["k3"] | ENTROPY | TRUNCATE,
    CLIP | {"sampling_temperature": 1.3} | TOKEN_MEAN | ENTROPY,
]


# --- what both sides get --------------------------------------------------------------------------------------------


def make_rollouts() -> list[dict]:
    """Return ragged rollouts of two questions, as numbers: no group has equal rewards, no response its group's mean."""
    generator = random.Random(0)
    rollouts = []
    for index, length in enumerate((7, 1, 4, 3, 5, 7, 2, 6)):
        is_truncated = index in (2, 5)
        tokens = [generator.randrange(2, VOCABULARY) for _ in range(length - 1)]
        last = generator.randrange(2, VOCABULARY) if is_truncated else EOS
        log_probs = [-abs(generator.gauss(0, 2)) for _ in range(length)]
        row_shift = generator.gauss(0, 0.06)
        rollouts.append(
            {
                "prompt_ids": [3, 4, 5] if index < GROUP_SIZE else [6, 7],
                "token_ids": [*tokens, last],
                "finish_reason": "length" if is_truncated else "stop",
                "reward": (1.0, 0.0, 0.0, 1.0, 0.0, 0.25, 1.0, 0.0)[index],
                "log_probs": log_probs,
                "entropy": [abs(generator.gauss(0, 1)) for _ in range(length)],
                "old": [value + row_shift + generator.gauss(0, 0.3) for value in log_probs],
                "engine_noise": [row_shift + generator.gauss(0, 0.2) for _ in range(length)],
                "reference": [value + generator.gauss(0, 0.5) for value in log_probs],
            }
        )
    return rollouts


def make_model() -> LlamaForCausalLM:
    """Return a tiny model whose float64 weights depend on a seed alone, not on Transformers' way to begin."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.3 * noise)
    return model


def response_log_probs(model: torch.nn.Module, rollout: dict, temperature: float) -> torch.Tensor:
    """Return log p of a rollout's response tokens, from a plain forward pass of its own."""
    ids = torch.tensor([rollout["prompt_ids"] + rollout["token_ids"]])
    logits = model(input_ids=ids).logits[0, len(rollout["prompt_ids"]) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(rollout["token_ids"])[:, None])[:, 0]


def for_steps(rollouts: list[dict], temperature: float) -> list[dict]:
    """Return the rollouts with log-probs of the tiny model: old, engine's and reference at the same distances."""
    model = make_model()
    moved = []
    for rollout in rollouts:
        with torch.no_grad():
            own = response_log_probs(model, rollout, temperature).tolist()
        distances = {
            name: [a - b for a, b in zip(rollout[name], rollout["log_probs"], strict=True)]
            for name in ("old", "reference")
        }
        moved.append(rollout | {"log_probs": own})
        moved[-1] |= {name: [a + b for a, b in zip(own, distances[name], strict=True)] for name in distances}
    return moved


def engine_log_probs(rollout: dict, off_policy: bool) -> list[float]:
    """Return the engine's log-probs: those of the policy that it copied, with noise."""
    copied = rollout["old" if off_policy else "log_probs"]
    return [a + b for a, b in zip(copied, rollout["engine_noise"], strict=True)]


def describe(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Return the norm of each tensor, and its products with fixed directions of length 1."""
    described = {}
    for name, tensor in sorted(tensors.items()):
        generator = torch.Generator().manual_seed(len(described))
        directions = torch.randn(NUM_DIRECTIONS, tensor.numel(), generator=generator, dtype=torch.float64)
        directions /= directions.norm(dim=1, keepdim=True)
        flat = tensor.detach().double().flatten()
        described[name] = [flat.norm().item(), *(directions @ flat).tolist()]
    return described


# --- the equations, token by token ----------------------------------------------------------------------------------


def scaled_advantages(rewards: list, scale: bool | str, eps: float) -> list:
    """Return advantages by their definitions, in the numbers of the rewards."""
    from mpmath import mpf, sqrt

    def sample_std(values: list) -> mpf:
        mean = sum(values) / len(values)
        return sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))

    advantages = []
    for start in range(0, len(rewards), GROUP_SIZE):
        group = rewards[start : start + GROUP_SIZE]
        mean = sum(group) / len(group)
        divisors = {True: lambda g=group: sample_std(g) + eps, False: lambda: mpf(1)}
        divisors |= {"batch": lambda: sample_std(rewards) + eps, "mean": lambda m=mean: m}
        advantages += [(reward - mean) / divisors[scale]() for reward in group]
    return advantages


def engine_weights(rollout: dict, copied: list, config: dict) -> list:
    """Return w of each token. TIS: Yao et al. 2025. IcePop: 2510.18855. MIS, geometric mean: Liu et al. 2025."""
    from mpmath import exp, mpf

    correction = config.get("engine_correction", "none")
    engine = engine_log_probs(rollout, config.get("off_policy", False))
    logs = [
        mpf(0) if place < config.get("sampling_min_tokens", 0) else mpf(a) - mpf(b)
        for place, (a, b) in enumerate(zip(copied, engine, strict=True))
    ]
    cap, length = mpf(config.get("engine_correction_cap", 1)), len(logs)
    if correction == "token_truncate":
        return [min(exp(log), cap) for log in logs]
    if correction == "token_mask":
        return [exp(log) if 1 / cap <= exp(log) <= cap else mpf(0) for log in logs]
    if correction in ("sequence_truncate", "sequence_mask"):
        product = mpf(1)
        for log in logs:
            product *= exp(log)
        beyond = cap if correction == "sequence_truncate" else mpf(0)
        return [product if product <= cap else beyond] * length
    if correction == "sequence_mean_mask":
        counted = logs[config.get("sampling_min_tokens", 0) :]
        mean = exp(sum(counted) / len(counted)) if counted else mpf(1)
        return [mpf(1) if 1 / cap <= mean <= cap else mpf(0)] * length
    return [mpf(1)] * length


def row_loss(rollout: dict, advantage, reward, x: list, x0: list, entropy: list, config: dict) -> list:
    """Return the loss of each token of a response at log-probs x. At x0 they stand where a stop-gradient is."""
    from mpmath import exp, mpf

    copied = rollout["old"] if config.get("off_policy") else x0
    old = [mpf(value) for value in copied]
    if config.get("ratio_level") == "sequence":  # GSPO-token, 2507.18071, equation 14: sg(s) pi / sg(pi)
        s = exp(sum(a - b for a, b in zip(x0, old, strict=True)) / len(x))
        ratios = [s * exp(a) / exp(b) for a, b in zip(x, x0, strict=True)]
        fixed = [s] * len(x)
    else:
        ratios = [exp(a) / exp(b) for a, b in zip(x, old, strict=True)]
        fixed = [exp(a) / exp(b) for a, b in zip(x0, old, strict=True)]
    low = 1 - mpf(config.get("cliprange", 0.2))
    high = 1 + mpf(config.get("cliprange_high", config.get("cliprange", 0.2)))
    dual = mpf(config.get("cliprange_dual", 0))
    weights = engine_weights(rollout, copied, config)
    losses = []
    for t, ratio in enumerate(ratios):
        name = config["loss_type"]
        if name == "no_baseline":
            loss = -reward * x[t]
        elif name == "reinforce_with_baseline":
            loss = -advantage * x[t]
        elif name == "grpo_no_clip":
            loss = -ratio * advantage
        elif name == "cispo":
            loss = -min(fixed[t], mpf(config["ratio_cap"])) * advantage * x[t]
        else:
            loss = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
            if dual and advantage < 0:  # 1912.09729, equation 5
                loss = -max(-loss, dual * advantage)
        loss *= weights[t]
        d = x[t] - mpf(rollout["reference"][t])
        estimators = {"k1": d, "k2": d * d / 2, "k3": exp(-d) - 1 + d}
        loss += mpf(config.get("kl_coefficient", 0)) * estimators[config.get("kl_estimator", "k3")]
        losses.append(loss - mpf(config.get("entropy_coefficient", 0)) * entropy[t])
    return losses


def by_equations(rollouts: list[dict], config: dict) -> dict:
    """Return the loss of the step and its gradient by the log-probs and by the entropies, as differences."""
    from mpmath import mp, mpf

    mp.dps = 50
    step = mpf(10) ** -18
    rewards = [mpf(rollout["reward"]) for rollout in rollouts]
    advantages = scaled_advantages(rewards, config.get("use_std_normalization", True), mpf(EPS))
    num_tokens = sum(len(rollout["token_ids"]) for rollout in rollouts)
    total, gradients, of_entropy = mpf(0), [], []
    for rollout, advantage, reward in zip(rollouts, advantages, rewards, strict=True):
        x0, entropy = [mpf(value) for value in rollout["log_probs"]], [mpf(value) for value in rollout["entropy"]]

        def share(x, entropy, rollout=rollout, advantage=advantage, reward=reward, x0=x0):
            losses = row_loss(rollout, advantage, reward, x, x0, entropy, config)
            divisors = {"masked_mean": NUM_ROWS * len(losses), "masked_normalize": NUM_ROWS * LONGEST}
            return sum(losses) / (divisors | {"token_mean": num_tokens})[config["length_normalization"]]

        def differences(values, at):
            return [
                float((at(_moved(values, t, step)) - at(_moved(values, t, -step))) / (2 * step))
                for t in range(len(values))
            ]

        total += share(x0, entropy)
        gradients.append(differences(x0, lambda x, share=share, entropy=entropy: share(x, entropy)))
        of_entropy.append(differences(entropy, lambda e, share=share, x0=x0: share(x0, e)))
    return {"loss": float(total), "gradient": gradients, "entropy_gradient": of_entropy}


def _moved(values: list, place: int, step) -> list:
    return [value + step * (index == place) for index, value in enumerate(values)]


# --- TRL ------------------------------------------------------------------------------------------------------------


def trl_arguments(config: dict, num_microbatches: int, folder: str) -> dict:
    """Return TRL's settings for a configuration of ours."""
    is_cispo = config["loss_type"] == "cispo"
    names = {"masked_mean": "grpo", "masked_normalize": "dr_grpo", "token_mean": "dapo"}
    cliprange = config.get("cliprange", 0.2)
    correction = config.get("engine_correction", "none")
    cap = config.get("engine_correction_cap", 1.0)
    if is_cispo and config["length_normalization"] != "token_mean":
        raise ValueError("TRL's cispo is a mean over tokens")
    return {
        "loss_type": "cispo" if is_cispo else names[config["length_normalization"]],
        "importance_sampling_level": config.get("ratio_level", "token"),
        "epsilon": cliprange,
        "epsilon_high": config["ratio_cap"] if is_cispo else config.get("cliprange_high", cliprange),
        "delta": config.get("cliprange_dual"),
        "beta": config.get("kl_coefficient", 0.0),
        "use_bias_correction_kl": False,
        "entropy_coef": config.get("entropy_coefficient", 0.0),
        "scale_rewards": {True: "group", False: "none", "batch": "batch"}[config.get("use_std_normalization", True)],
        "mask_truncated_completions": config.get("mask_truncated_responses", False),
        "temperature": config.get("sampling_temperature", 1.0),
        "vllm_importance_sampling_mode": "token_truncate" if correction == "none" else correction,
        "vllm_importance_sampling_clip_max": cap,
        "vllm_importance_sampling_clip_min": 1 / cap if correction == "token_mask" else None,
        "num_iterations": 2 if config.get("off_policy") else 1,  # 2: the old log-probs are scored
        "num_generations": GROUP_SIZE,
        "per_device_train_batch_size": NUM_ROWS // num_microbatches,
        "gradient_accumulation_steps": num_microbatches,
        "max_completion_length": LONGEST,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": folder,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def make_trainer(rollouts: list[dict], config: dict, num_microbatches: int, folder: str, given: dict | None):
    """Return TRL's trainer on the fixed rollouts.

    Args:
        rollouts, config: see above.
        num_microbatches: of its optimizer step.
        folder: of the tiny model with its tokenizer.
        given: `log_probs` and `entropy` with gradient, (B, T); None: those of the model.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    places = {tuple(rollout["token_ids"]): index for index, rollout in enumerate(rollouts)}
    prompts = {" ".join(f"t{i}" for i in rollout["prompt_ids"]): rollout["prompt_ids"] for rollout in rollouts}
    off_policy = config.get("off_policy", False)

    class FixedTrainer(GRPOTrainer):
        """Gets rollouts, rewards, and the log-probs of all but the policy."""

        gradients: dict[str, torch.Tensor]

        def _generate(self, texts):
            chosen = [rollout for rollout in rollouts if rollout["prompt_ids"] in [prompts[text] for text in texts]]
            assert [rollout["prompt_ids"] for rollout in chosen] == [prompts[text] for text in texts]
            ids, engine = [row["token_ids"] for row in chosen], [engine_log_probs(row, off_policy) for row in chosen]
            return [row["prompt_ids"] for row in chosen], ids, None, [""] * len(ids), engine, {}, None, []

        def _calculate_rewards(self, inputs, texts, completions, completion_ids_list):
            return torch.tensor([[rollouts[places[tuple(ids)]]["reward"]] for ids in completion_ids_list])

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
            if torch.is_grad_enabled() and given is None:
                return super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
                )
            rows = []
            for ids in input_ids[:, -logits_to_keep:].tolist():
                rows += [i for tokens, i in places.items() if ids == [*tokens, *[0] * (len(ids) - len(tokens))]]
            assert len(rows) == len(input_ids)
            if torch.is_grad_enabled():
                return given["log_probs"][rows, :logits_to_keep], given["entropy"][rows, :logits_to_keep], None
            name = "reference" if model is self.ref_model else "old" if off_policy else "log_probs"
            return padded([rollouts[row][name] for row in rows])[:, :logits_to_keep], None, None

        def _optimizer_step_is_next(self):
            self.gradients = {name: part.grad.clone() for name, part in self.model.named_parameters()}

    from transformers import TrainerCallback

    class Capture(TrainerCallback):
        """Keeps the gradient that the optimizer gets, and the weights before."""

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            trainer._optimizer_step_is_next()

    trainer = FixedTrainer(
        model=folder,
        args=GRPOConfig(
            model_init_kwargs={"dtype": torch.float64},
            **{k: v for k, v in trl_arguments(config, num_microbatches, folder + "/out").items() if v is not None},
        ),
        reward_funcs=lambda **kwargs: None,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        callbacks=[Capture()],
    )
    trainer.use_vllm = config.get("engine_correction", "none") != "none"  # it corrects, but samples with `_generate`
    return trainer


def padded(rows: list[list[float]]) -> torch.Tensor:
    """Return rows of numbers as (B, LONGEST), with zeros behind."""
    return torch.tensor([[*row, *[0.0] * (LONGEST - len(row))] for row in rows], dtype=torch.float64)


def by_trl(rollouts: list[dict], config: dict, folder: str) -> dict:
    """Return the loss of TRL's trainer and its gradient by the log-probs and by the entropies."""
    given = {
        name: padded([rollout[name] for rollout in rollouts]).requires_grad_() for name in ("log_probs", "entropy")
    }
    trainer = make_trainer(rollouts, config, 1, folder, given)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    texts = [" ".join(f"t{i}" for i in rollout["prompt_ids"]) for rollout in rollouts]
    inputs = trainer._generate_and_score_completions([{"prompt": text} for text in texts])
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    result = {"loss": loss.item()}
    for name, key in (("log_probs", "gradient"), ("entropy", "entropy_gradient")):
        gradient = torch.zeros_like(given[name]) if given[name].grad is None else given[name].grad
        result[key] = [row[: len(r["token_ids"])] for row, r in zip(gradient.tolist(), rollouts, strict=True)]
    return result | {"advantages": inputs["advantages"].flatten().tolist()}


def step_by_trl(rollouts: list[dict], config: dict, num_microbatches: int, folder: str) -> dict:
    """Return the gradient of one optimizer step of TRL's trainer, clipped, and the change of the weights."""
    trainer = make_trainer(rollouts, config, num_microbatches, folder, None)
    before = {name: part.detach().clone() for name, part in trainer.model.named_parameters()}
    trainer.train()
    change = {name: part.detach() - before[name] for name, part in trainer.model.named_parameters()}
    return {"gradient": describe(trainer.gradients), "change": describe(change)}


def save_model(folder: str) -> None:
    """Save the tiny model with a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCABULARY)}, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1", pad_token="t0").save_pretrained(folder)
    make_model().save_pretrained(folder)


def main() -> None:
    """Write the file."""
    torch.set_default_dtype(torch.float64)
    rollouts = make_rollouts()
    result: dict = {
        "made_by": "tests/make_reference_numbers.py",
        "versions": {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch", "mpmath")},
        "rollouts": rollouts,
        "losses": [],
        "advantages": [],
        "steps": [],
    }
    for config in OF_EQUATIONS:
        config = {"length_normalization": "masked_mean", **config}
        result["losses"].append({"source": "equations", "config": config, **by_equations(rollouts, config)})
    rewards = [rollout["reward"] for rollout in rollouts]
    for scale in SCALES:
        advantages = [float(value) for value in scaled_advantages(rewards, scale, EPS)]
        result["advantages"].append({"source": "equations", "scale": scale, "advantages": advantages})
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        for config in OF_TRL:
            config = {"length_normalization": "masked_mean", **config}
            found = by_trl(rollouts, config, folder)
            advantages, scale = found.pop("advantages"), config.get("use_std_normalization", True)
            result["losses"].append({"source": "TRL", "config": config, **found})
            row = {"source": "TRL", "scale": scale, "advantages": advantages}
            result["advantages"] += [] if row in result["advantages"] else [row]
        for number, config in enumerate(OF_STEPS):
            config = {"length_normalization": "masked_mean", **config}
            own = for_steps(rollouts, config.get("sampling_temperature", 1.0))
            # Of TRL's means over rows, two microbatches of four rows are the mean as well. Old log-probs need one.
            num_microbatches = 1 if config.get("off_policy") or config.get("entropy_coefficient") else 1 + number % 2
            found = step_by_trl(own, config, num_microbatches, folder)
            log_probs = {name: [row[name] for row in own] for name in ("log_probs", "old", "reference")}
            result["steps"].append(
                {"source": "TRL", "config": config, "num_microbatches": num_microbatches, **log_probs, **found}
            )
    assert all(math.isfinite(case["loss"]) for case in result["losses"])
    lines = [f"{json.dumps(key)}: {_rows(value)}" for key, value in result.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {len(result['losses'])} losses and {len(result['steps'])} steps to {PATH}")


def _rows(value: object) -> str:
    """Return JSON with one line for each entry of a list."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(f" {json.dumps(entry)}" for entry in value) + "\n]"


if __name__ == "__main__":
    main()
