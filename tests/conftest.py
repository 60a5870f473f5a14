"""Fixtures that several test folders use: small text models in the layout in which they are published."""

from pathlib import Path

import pytest
import torch

# What takes long and has a quicker sibling in the default run; `make test-slow` and CI run it. Parts of node ids.
SLOW = (
    "distributed/test_equal_runs.py::",
    "distributed/test_synchronized_gan.py::",
    "e2e/test_demo.py::",
    "e2e/test_evaluation_scripts.py::test_two_ranks_give_the_figures_of_one",
    "e2e/test_every_config.py::test_two_steps_and_one_sample_with_few_channels[ldm/",
    "e2e/test_every_config.py::test_two_steps_and_one_sample_with_few_channels[autoencoder/",
    "e2e/test_every_config.py::test_two_steps_and_one_sample_with_few_channels[demo/txt2img_",
    "e2e/test_every_config.py::test_two_steps_and_one_sample_with_few_channels[demo/autoencoder_",
    "e2e/test_every_config.py::test_dry_run_at_full_size[autoencoder/",
    "e2e/test_every_config.py::test_dry_run_at_full_size[demo/",
    "e2e/test_every_config.py::test_dry_run_at_full_size[own/",
    "e2e/test_every_config.py::test_own_data_by_a_path[finetune",
    "e2e/test_every_config.py::test_own_data_by_a_path[pairs",
    "e2e/test_every_config.py::test_own_data_by_a_path[masks",
    "e2e/test_many_channels.py::",
    "e2e/test_map_scripts.py::test_tiles_of_layouts",
    "e2e/test_task_data.py::test_trains_and_draws_from_files",
    "ablation/test_resolving.py::test_the_studies_of_the_paper_have_the_published_sizes",
    "ablation/test_resolving.py::test_first_stages_are_all_judged_by_the_images_of_the_latent_models",
    "ablation/test_resolving.py::test_what_the_paper_trained_is_missed_before_a_run",
    "ablation/test_resolving.py::test_the_other_studies_share_what_their_trials_have_in_common[t",
    "ablation/test_resolving.py::test_the_other_studies_share_what_their_trials_have_in_common[imagenet",
    "ablation/test_resolving.py::test_the_other_studies_share_what_their_trials_have_in_common[objectives",
    "ablation/test_resolving.py::test_the_other_studies_share_what_their_trials_have_in_common[backbones",
    "ablation/test_resolving.py::test_the_other_studies_share_what_their_trials_have_in_common[samplers",
    "ablation/test_runner.py::test_a_job_outlives_a_killed_runner_and_is_not_done_beside_itself",
    "breakage/test_processes.py::test_a_loader_worker_that_dies_is_named_with_how_to_go_on",
    "breakage/test_processes.py::test_a_second_process_is_refused_by_name_and_the_first_goes_on",
    "compat/diffusers/test_round_trip.py::",
    "data/test_digits.py::test_the_real_ones",
    "evaluation/test_extractors.py::test_training_lowers_the_loss_and_repeats_itself",
    "evaluation/test_scene_detector.py::test_one_wrong_thing_is_rejected",
    "evaluation/test_tasks.py::test_the_judge_of_digits_learns_and_leaves_the_random_state_alone",
    "networks/test_dit.py::test_cost_is_that_of_the_paper[1",
    "networks/test_dit.py::test_cost_is_that_of_the_paper[2",
    "training/test_signals.py::test_the_signal_that_killed_a_worker_is_named_also_where_its_state_was_asked_first",
    "training/test_cost.py::test_counted_activations_are_those_of_a_real_step",
    "training/test_shares.py::",
    "doctor/test_plan.py::test_a_report_with_its_page_and_a_batch_that_does_not_fit",
    "ablation/test_report.py::test_many_trials_are_shown_in_panels",
    "e2e/test_mutated_configs.py::",
    "training/test_resume.py::test_killed_and_resumed_ends_the_same[autoencoder",
    "training/test_resume.py::test_damaged_values_are_not_gone_on_from[",
    "training/test_resume.py::test_stopped_and_resumed_ends_the_same[",
    "training/test_resume.py::test_killed_and_resumed_ends_the_same[diffusion-on_train_batch_start-6",
    "training/test_resume.py::test_killed_and_resumed_ends_the_same[diffusion-on_validation",
    "training/test_resume.py::test_a_finished_run_that_is_prolonged_ends_the_same[autoencoder",
    "training/test_latent_cache.py::test_training_from_the_cache_is_training_from_images[False",
    "data/test_streams.py::test_uneven_shards_are_shown_equally_often[2000",
)

# Variants that differ from what the slow suite tests in sizes alone.
PROOF = tuple(
    f"ablation/test_resolving.py::test_the_other_studies_share_what_their_trials_have_in_common[imagenet_{name}"
    for name in ("alignment", "averages", "guidance_kinds", "objectives")
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is listed in PROOF and SLOW."""
    for item in items:
        if any(part in item.nodeid for part in PROOF):
            item.add_marker(pytest.mark.proof)
        elif item.get_closest_marker("proof") is None and any(part in item.nodeid for part in SLOW):
            item.add_marker(pytest.mark.slow)


WORDS = ["a", "red", "blue", "circle", "square", "two", "green", "triangles"]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH = 16
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """Give a folder with a BERT tokenizer whose vocabulary is BERT_WORDS."""
    from transformers import BertTokenizerFast  # heavy: only for the tests that need it

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS))
    BertTokenizerFast.from_pretrained(str(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """Give a folder with a CLIP text model of width 16 and context 8, and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    vocabulary = {word: i for i, word in enumerate([BEGIN, END, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, 0), (END, 1)]
    )
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def open_clip_folder(clip_folder, tmp_path_factory) -> Path:
    """Give a folder with a text model as OpenCLIP has them, of three layers, in the layout of transformers."""
    import transformers

    folder = tmp_path_factory.mktemp("open_clip")
    transformers.AutoTokenizer.from_pretrained(str(clip_folder)).save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=TEXT_WIDTH,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    transformers.CLIPTextModelWithProjection(config).eval().save_pretrained(folder)
    return folder
