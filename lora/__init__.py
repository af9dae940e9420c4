"""What is taught: LoRA files in every spelling, and adapters that come and go without a trace."""
