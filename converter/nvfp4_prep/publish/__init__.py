"""Publishing on the Hugging Face Hub: repositories, uploads, and verification of what is published."""
