"""What a model is: architecture, family tables, Hugging Face folders."""
