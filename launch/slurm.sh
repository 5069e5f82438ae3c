#!/usr/bin/env bash
# The batch script of launch/slurm.py: the command after it, once in every task.
#
# Hardware: GPU nodes, a task for each GPU; jax finds the others by SLURM_*. Cost to try: the allocation while it runs.
# Stop: scancel JOB. Five minutes before the time limit, and at preemption, the tasks get SIGTERM and save; their exit
# status 75 puts the job back into the queue, with the same command, and it goes on. Any other status ends it.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -uo pipefail
srun "$@"
status=$?
if [[ $status -eq 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
