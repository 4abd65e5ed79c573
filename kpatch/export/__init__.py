"""Patches for other programs: LoRA adapters for PEFT and llama.cpp."""
