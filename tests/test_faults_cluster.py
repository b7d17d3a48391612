"""Which test shows what becomes of each fault of hosts, launchers and batch systems."""

from __future__ import annotations

import pytest

from tests.fixtures import assert_marked

_HANGS, _HOSTS, _SECURITY = "test_faults_watchdog", "test_hosts_ssh", "test_security"
FAULTS = {
    7: [
        "test_orphans.test_ranks_end_when_mpirun_is_killed",
        f"{_HANGS}.test_killed_from_outside_the_files_tell",
    ],
    8: [f"{_HOSTS}.test_a_host_loses_its_daemon_and_its_ranks", f"{_HOSTS}.test_a_link_is_cut"],
    10: [f"{_HANGS}.test_a_rank_that_hangs_ends_the_job"],
    11: [f"{_HANGS}.test_a_pause_changes_nothing"],
    12: [
        f"{_HANGS}.test_a_rank_that_leaves_an_operation_out",
        f"{_HANGS}.test_a_rank_that_hangs_ends_the_job",
    ],
    13: [f"{_HANGS}.test_a_rank_that_hangs_ends_the_job"],
    14: [f"{_HANGS}.test_a_slow_rank_is_named_and_changes_nothing"],
    15: [
        f"{_HOSTS}.test_rows_are_those_of_one_process",
        f"{_HOSTS}.test_the_link_bench_names_the_slow_host",
    ],
    16: [
        "test_faults_generate.test_a_signal_ends_a_launch_early",
        "test_faults_finetune.test_a_signal_ends_a_launch_and_loses_no_step",
        "test_slurm.test_a_job_that_is_preempted_goes_on",
    ],
    17: [
        "test_faults_generate.test_a_signal_ends_a_launch_early",
        "test_faults_finetune.test_signals_at_bad_moments",
    ],
    20: ["test_slurm_text.test_requeues_have_an_end"],
    28: [f"{_HOSTS}.test_a_shard_is_missing_on_one_host"],
    43: [
        "test_hosts.test_mpirun_reads_comments_and_strange_paths",
        "test_slurm_text.test_nothing_that_a_user_gives_is_a_command",
        f"{_SECURITY}.test_a_path_is_never_read_by_a_shell",
        f"{_SECURITY}.test_a_link_ends_a_job_before_it_writes",
        f"{_SECURITY}.test_names_that_lead_up_are_not_followed",
    ],
    44: [
        f"{_SECURITY}.test_a_secret_is_in_no_file_and_no_message",
        f"{_SECURITY}.test_a_secret_is_in_no_command_line",
        f"{_SECURITY}.test_a_batch_script_has_no_secret",
    ],
    47: [
        f"{_HOSTS}.test_one_host_has_something_else_installed",
        "test_faults.test_the_peer_that_differs_is_named",
    ],
    48: [f"{_HOSTS}.test_a_clock_steps"],
}
MUST_HOLD = {7, 8, *range(10, 18), 20, 28, 43, 44, 47, 48}

pytestmark = pytest.mark.fault


def test_every_fault_has_its_test():
    assert FAULTS.keys() == MUST_HOLD
    assert_marked(FAULTS, "test_faults_cluster")
