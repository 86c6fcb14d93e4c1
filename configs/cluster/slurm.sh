#!/bin/bash
# PPO of the 6.9B model on two nodes of 8 GPUs: sbatch configs/cluster/slurm.sh
# Ten minutes before the time limit the run saves and stops, and the job is queued again; submitted again after anything
# else, it goes on from its last checkpoint.
#SBATCH --job-name=ppo_6.9b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@600
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # newer versions of srun do not take it over
export SLURM_KILL_BAD_EXIT=1                      # one process that fails would leave the others waiting
STATUS=0
srun python train.py fit --config configs/tldr/common.yaml --config configs/tldr/ppo.yaml --config configs/tldr/ppo_6.9b.yaml \
    --run_dir runs/tldr_6.9b/ppo --ckpt_path last --trainer.num_nodes "$SLURM_NNODES" || STATUS=$?
if [ "$STATUS" -eq 138 ]; then scontrol requeue "$SLURM_JOB_ID"; fi  # 138: stopped by SIGUSR1
exit "$STATUS"
