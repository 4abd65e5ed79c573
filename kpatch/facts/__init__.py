"""Fact files in, checked; prompts as tokens and the place of the subject's last one."""
