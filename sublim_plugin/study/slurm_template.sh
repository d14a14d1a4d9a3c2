#!/bin/bash
# The batch script of `sublim run STUDY --engine slurm`, one for all tasks. To change it:
#
#   sublim template slurm > lab.sh      # edit, then
#   sublim run STUDY --engine slurm --slurm-template lab.sh
#
# Full finetuning on more GPUs: --slurm-template lab.sh --slurm-template student-full=eight.sh
#
# Job name, array, log file and dependencies are given to sbatch by sublim; all else is said here.
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
##SBATCH --partition=gpu
##SBATCH --account=my-lab

# A task that is preempted, or that comes near its time limit, goes back to the queue; there each
# of its cells continues from what is complete.
#SBATCH --requeue
#SBATCH --signal=B:TERM@120

set -euo pipefail

# Set-up of the compute node, for example:
# module load cuda
# export SUBLIM_CACHE=/scratch/$USER/sublim HF_HUB_OFFLINE=1

# `exec`: the signal above goes to this shell and must reach sublim. Placeholders stand in double
# braces: "command" is the Python that submitted, running sublim with the task's "arguments";
# "work" is teacher, dataset, student, student-full, probe, localization, signal or report. In a
# container:
#   exec apptainer exec --nv sublim.sif sublim ARGUMENTS    (the placeholder in place of the word)
exec {{command}}
