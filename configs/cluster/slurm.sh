#!/bin/bash
# PPO of the 6.9B model on two nodes of 8 GPUs: sbatch configs/cluster/slurm.sh
# Submitted again, or requeued after the time limit, it goes on from its last checkpoint.
#SBATCH --job-name=ppo_6.9b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=SIGTERM@600
RUN=runs/tldr_6.9b/ppo
if [ -e "$RUN/config.yaml" ]; then RESUME="--ckpt_path last"; fi
srun python train.py fit --config configs/tldr/common.yaml --config configs/tldr/ppo.yaml --config configs/tldr/ppo_6.9b.yaml \
    --run_dir "$RUN" --trainer.num_nodes "$SLURM_NNODES" $RESUME
