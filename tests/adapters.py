"""One-line calls under the official names of CS336 Assignment 5, so that its test suite runs unmodified."""

import GRPO_helper
import SFT_helper
from supplement import DPO_helper, answer_parsers, instruction_data


def run_tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer):
    return SFT_helper.tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer)


def run_compute_group_normalized_rewards(
    reward_fn, rollout_responses, repeated_ground_truths, group_size, advantage_eps, normalize_by_std
):
    return GRPO_helper.compute_group_normalized_rewards(
        reward_fn, rollout_responses, repeated_ground_truths, group_size, advantage_eps, normalize_by_std
    )


def run_compute_entropy(logits):
    return SFT_helper.compute_entropy(logits)


def run_get_response_log_probs(model, input_ids, labels, return_token_entropy):
    return SFT_helper.get_response_log_probs(model, input_ids, labels, return_token_entropy)


def run_compute_naive_policy_gradient_loss(raw_rewards_or_advantages, policy_log_probs):
    return GRPO_helper.compute_naive_policy_gradient_loss(raw_rewards_or_advantages, policy_log_probs)


def run_compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange):
    return GRPO_helper.compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)


def run_compute_policy_gradient_loss(policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange):
    return GRPO_helper.compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange
    )


def run_masked_mean(tensor, mask, dim=None):
    return GRPO_helper.masked_mean(tensor, mask, dim)


def run_sft_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant=1.0):
    return SFT_helper.sft_microbatch_train_step(
        policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant
    )


def run_grpo_microbatch_train_step(
    policy_log_probs,
    response_mask,
    gradient_accumulation_steps,
    loss_type,
    raw_rewards=None,
    advantages=None,
    old_log_probs=None,
    cliprange=None,
):
    return GRPO_helper.grpo_microbatch_train_step(
        policy_log_probs,
        response_mask,
        gradient_accumulation_steps,
        loss_type,
        raw_rewards,
        advantages,
        old_log_probs,
        cliprange,
    )


def run_masked_normalize(tensor, mask, dim=None, normalize_constant=1.0):
    return SFT_helper.masked_normalize(tensor, mask, normalize_constant, dim)


def get_packed_sft_dataset(tokenizer, dataset_path, seq_length, shuffle):
    return instruction_data.PackedDataset(tokenizer, dataset_path, seq_length, shuffle)


def run_iterate_batches(dataset, batch_size, shuffle):
    return instruction_data.iterate_batches(dataset, batch_size, shuffle)


def run_parse_mmlu_response(mmlu_example, model_output):
    return answer_parsers.parse_mmlu_response(mmlu_example, model_output)


def run_parse_gsm8k_response(model_output):
    return answer_parsers.parse_gsm8k_response(model_output)


def run_compute_per_instance_dpo_loss(lm, lm_ref, tokenizer, beta, prompt, response_chosen, response_rejected):
    return DPO_helper.compute_per_instance_dpo_loss(
        lm, lm_ref, tokenizer, beta, prompt, response_chosen, response_rejected
    )
