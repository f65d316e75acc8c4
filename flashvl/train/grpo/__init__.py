"""Group-relative policy optimization (GRPO, DeepSeekMath 2024) on the project's own engine."""
