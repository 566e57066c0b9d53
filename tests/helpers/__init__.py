"""What tests share: writers of small files, local servers, references, drivers."""
