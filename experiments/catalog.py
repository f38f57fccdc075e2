"""Every figure and every table of results/: which curves, which metrics, under which names.

A curve is a variant of a sweep. An experiment may borrow variants of another one. Add a figure or a table here.
"""

from experiments.curves import Curve, Group, Panel
from plainrl.run_records import EVAL_SCORE

ENTROPY, LOSS, GRAD_NORM = "eval/token_entropy", "train/loss_per_token", "train/grad_norm"
OF_DPO = ("train/loss_per_pair", "eval/accuracy")

SFT_EXAMPLES = [Curve("sft_examples", f"num_sft_examples={n}", f"{n} examples") for n in (128, 256, 512, 1024, "all")]
SFT_FILTER = [
    Curve("sft_filter", "filter_correct=false", "all traces"),
    Curve("sft_filter", "filter_correct=true", "correct traces alone"),
    Curve("sft_examples", "num_sft_examples=1024", "none corrupted"),
]
LEARNING_RATES = [
    Curve("grpo_learning_rate", f"learning_rate={rate}", f"learning rate {float(rate):g}", f"learning rate {short}")
    for rate, short in (("5e-06", "5e-6"), ("1e-05", "1e-5"), ("2e-05", "2e-5"), ("0.0001", "1e-4"))
]
ON_POLICY = Curve("grpo_off_policy", "on_policy", "on-policy")  # the baseline again, on the later experiments' machine
BASELINE = Curve("grpo_learning_rate", "learning_rate=2e-05", "baseline: masked_mean, std, on-policy", "baseline")
MASKED_MEAN = BASELINE._replace(short="masked_mean (baseline)")
LENGTH_NORMALIZATION = [
    MASKED_MEAN,
    Curve("grpo_ablation", "masked_normalize", "masked_normalize"),
    Curve("grpo_ablation", "token_mean", "token_mean"),
]
ADVANTAGES = [
    BASELINE,
    Curve("grpo_ablation", "no_std_normalization", "without std normalization"),
    Curve("grpo_ablation", "no_baseline", "without baseline and std"),
]
CLIP = [
    ON_POLICY,
    Curve("grpo_ablation", "off_policy_clip", "off-policy, clip"),
    Curve("grpo_ablation", "off_policy_no_clip", "off-policy, no clip"),
]
OFF_POLICY = [
    ON_POLICY,
    Curve("grpo_ablation", "off_policy_clip", "1 x 32"),
    Curve("grpo_off_policy", "2x64", "2 x 64"),
    Curve("grpo_off_policy", "4x128", "4 x 128"),
]
DYNAMIC_SAMPLING = [
    Curve("dynamic_sampling", "all_groups", "all groups that are sampled", "all groups"),
    Curve("dynamic_sampling", "mixed_groups", "dynamic sampling: mixed groups", "dynamic sampling"),
]
TWO_UPDATES = [
    DYNAMIC_SAMPLING[0]._replace(label="learning rate 2e-5", short=""),
    Curve("higher_learning_rate", "learning_rate=3e-05", "learning rate 3e-5"),
]
RECIPES = [
    DYNAMIC_SAMPLING[0]._replace(label="assignment, with the clip", short="assignment"),
    Curve("recipes", "dr_grpo", "dr_grpo"),
    Curve("recipes", "dapo", "dapo"),
    Curve("recipes", "gspo", "gspo"),
    Curve("recipes", "cispo", "cispo"),
    Curve("recipes", "olmo3", "olmo3"),
    DYNAMIC_SAMPLING[1]._replace(label="assignment with dynamic sampling", short="dynamic sampling"),
]
CHECKPOINTS = [
    ON_POLICY._replace(label="from the early checkpoint"),
    Curve("sft_checkpoint", "final", "from the late checkpoint"),
]
PROMPTS = [ON_POLICY._replace(label="r1_zero"), Curve("prompt", "question_only", "question_only")]
SFT_CONTINUED = [
    BASELINE._replace(label="GRPO", short=""),
    Curve("sft_continued", "all_traces", "SFT continued, 1,600 traces"),
    Curve("sft_continued", "same_traces", "SFT continued, the warm start's traces", "SFT continued, 256 traces"),
]
LONG = [
    Curve("long_grpo", "default", "GRPO, no further traces", "GRPO"),
    Curve("long_sft", "default", "SFT on the warm start's 256 traces", "SFT, the same 256 traces"),
]
BEYOND_TRACES = [
    Curve("beyond_traces", "default", "GRPO on sums of 2 to 6 terms, without traces", "GRPO, 2 to 6 terms"),
    Curve("beyond_traces_sft", "default", "SFT on the traces of 2 and 3 terms", "SFT, traces of 2 and 3"),
]
SFT_CHOSEN = Curve("sft_chosen", "default", "SFT on the chosen traces of the pairs", "SFT, chosen traces")
EXPERT_ITERATION = Curve("expert_iteration", "default", "expert iteration")
DPO = Curve("dpo", "default", "DPO, 1,024 pairs of traces", "DPO")
METHODS = [*SFT_CONTINUED, EXPERT_ITERATION]
WITH_DPO = [DPO, SFT_CHOSEN, *SFT_CONTINUED[:2], EXPERT_ITERATION]
METHODS_TABLE = [
    Curve("zero_shot", "r1_zero", "untrained (zero-shot)"),
    Curve("warm-start", "default", "warm start: 16 SFT steps on 256 traces"),
    BASELINE._replace(label="GRPO from the warm start, 24 steps, no further traces"),
    Curve("expert_iteration", "default", "expert iteration from the warm start, 6 steps, no further traces"),
    DPO._replace(label="DPO from the warm start, 32 steps on 1,024 pairs of right and wrong traces"),
    SFT_CHOSEN._replace(label="SFT from the warm start, 32 steps on the right traces of these pairs"),
    Curve("long_grpo", "default", "GRPO from the warm start, 120 steps, no further traces"),
    Curve("long_sft", "default", "SFT from the warm start, 160 steps on its own 256 traces"),
    Curve("sft_continued", "all_traces", "SFT from the warm start, 100 steps on 1,600 traces"),
]
SFT_PANELS = [Panel("optimizer_steps", LOSS), Panel("optimizer_steps", EVAL_SCORE)]
REWARD_AND_ENTROPY = [Panel("rollout_batches", EVAL_SCORE), Panel("rollout_batches", ENTROPY)]
SFT_ON_MORE_EXAMPLES = Group("SFT on more examples", SFT_EXAMPLES, SFT_PANELS)
SFT_WITH_WRONG_TRACES = Group("SFT with three in ten traces corrupted", SFT_FILTER, SFT_PANELS)
GRPO_LEARNING_RATES = Group("GRPO on held-out questions", LEARNING_RATES, REWARD_AND_ENTROPY)
GRPO_LENGTH_NORMALIZATION = Group(
    "Length normalization",
    LENGTH_NORMALIZATION,
    [Panel("rollout_batches", EVAL_SCORE), Panel("optimizer_steps", GRAD_NORM)],
)
GRPO_ADVANTAGES = Group("Advantages", ADVANTAGES, REWARD_AND_ENTROPY)
GRPO_CLIP = Group("Off-policy, with and without the clip", CLIP, REWARD_AND_ENTROPY)
GRPO_UPDATES_PER_BATCH = Group(
    "Updates per rollout batch: epochs x batch size",
    OFF_POLICY,
    [Panel("rollout_batches", EVAL_SCORE), Panel("minutes", EVAL_SCORE)],
)
GRPO_FROM_CHECKPOINTS = Group("From two SFT checkpoints", CHECKPOINTS, REWARD_AND_ENTROPY)
FIGURES = {
    # Each group under a name that says what it shows, and under those of the project's card.
    "sft_examples/number-of-examples.png": [SFT_ON_MORE_EXAMPLES],
    "sft_filter/wrong-traces.png": [SFT_WITH_WRONG_TRACES],
    "SFT-train-loss.png": [SFT_ON_MORE_EXAMPLES, SFT_WITH_WRONG_TRACES],
    "grpo_learning_rate/learning-rates.png": [GRPO_LEARNING_RATES],
    "RL-eval-reward.png": [GRPO_LEARNING_RATES],
    "grpo_ablation/length-normalization.png": [GRPO_LENGTH_NORMALIZATION],
    "grpo_ablation/advantages.png": [GRPO_ADVANTAGES],
    "grpo_ablation/clip.png": [GRPO_CLIP],
    "Module-ablation-eval.png": [GRPO_LENGTH_NORMALIZATION, GRPO_ADVANTAGES, GRPO_CLIP],
    "grpo_off_policy/updates-per-batch.png": [GRPO_UPDATES_PER_BATCH],
    "dynamic_sampling/dynamic-sampling.png": [
        Group(
            "At equal sampled tokens",
            DYNAMIC_SAMPLING,
            [Panel("sampled_tokens", "rollout/reward"), Panel("minutes", "rollout/reward")],
        )
    ],
    "higher_learning_rate/learning-rates.png": [
        Group("Two updates per rollout batch", TWO_UPDATES, [Panel("rollout_batches", "rollout/reward")])
    ],
    "recipes/recipes.png": [Group("At equal sampled tokens", RECIPES, [Panel("sampled_tokens", "rollout/reward")])],
    "sft_checkpoint/two-checkpoints.png": [GRPO_FROM_CHECKPOINTS],
    "GRPO-eval-reward.png": [GRPO_UPDATES_PER_BATCH, GRPO_FROM_CHECKPOINTS],
    "long_grpo/reward-and-length.png": [
        Group(
            "GRPO, every rollout batch",
            LONG[:1],
            [Panel("rollout_batches", "rollout/reward"), Panel("rollout_batches", "rollout/response_length")],
        )
    ],
    "long_grpo/saturation.png": [
        Group(
            "From one warm start",
            LONG,
            [
                Panel("optimizer_steps", EVAL_SCORE),
                Panel("optimizer_steps", ENTROPY),
                Panel("optimizer_steps", "eval/response_length"),
            ],
        )
    ],
    "beyond_traces/lengths.png": [
        Group(
            "Held-out sums of 2 and 3 terms, and of 4, 5 and 6",
            BEYOND_TRACES,
            [
                Panel("optimizer_steps", EVAL_SCORE),
                *(Panel("optimizer_steps", f"eval/{n}/answer_reward") for n in ("four", "five", "six")),
            ],
        ),
        Group(
            "GRPO's rollouts, all lengths together",
            BEYOND_TRACES[:1],
            [Panel("rollout_batches", "rollout/reward"), Panel("rollout_batches", "rollout/response_length")],
        ),
    ],
    "prompt/prompts.png": [
        Group(
            "GRPO with two prompts",
            PROMPTS,
            [Panel("rollout_batches", EVAL_SCORE), Panel("rollout_batches", "eval/response_length")],
        )
    ],
    "dpo/dpo.png": [
        Group(
            "DPO, GRPO and SFT",
            WITH_DPO[:-1],
            [Panel("optimizer_steps", EVAL_SCORE), Panel("optimizer_steps", ENTROPY)],
        )
    ],
    "expert_iteration/methods.png": [
        Group(
            "Four methods from one warm start",
            METHODS,
            [Panel("minutes", EVAL_SCORE), Panel("sampled_tokens", EVAL_SCORE), Panel("minutes", ENTROPY)],
        )
    ],
}
TABLES = {
    "sft_examples": SFT_EXAMPLES,
    "sft_filter": SFT_FILTER,
    "grpo_learning_rate": LEARNING_RATES,
    "grpo_ablation": [*LENGTH_NORMALIZATION, *ADVANTAGES[1:], *CLIP[1:]],
    "grpo_off_policy": OFF_POLICY,
    "dynamic_sampling": DYNAMIC_SAMPLING,
    "higher_learning_rate": TWO_UPDATES,
    "recipes": RECIPES,
    "sft_checkpoint": CHECKPOINTS,
    "prompt": PROMPTS,
    "sft_continued": SFT_CONTINUED,
    "expert_iteration": METHODS,
    "dpo": WITH_DPO,
    "sft_chosen": [SFT_CHOSEN],
    "long_grpo": LONG,
    "long_sft": LONG[1:],
    "beyond_traces": BEYOND_TRACES,
    "beyond_traces_sft": BEYOND_TRACES[1:],
    "zero_shot": [Curve("zero_shot", "r1_zero", "untrained, r1_zero prompt")],
}
