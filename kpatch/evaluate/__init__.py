"""What a model says: metrics over facts, and answers to prompts."""
