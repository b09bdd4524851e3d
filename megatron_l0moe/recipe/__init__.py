"""What a user asks for: a recipe, its sections and its layouts, read strictly. No torch."""
