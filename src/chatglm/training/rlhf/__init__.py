"""Learning from preferences: reward model, bootstrap, DPO, PPO, RLOO and GRPO.

Read in this order: answers, policy, preferences, reward, dpo, rollout, advantages, ppo, rloo; judge, watch and guards
stand beside them, bootstrap uses most of it. Source of the recipes: spec/training.md §4.
"""
