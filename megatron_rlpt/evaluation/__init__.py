"""After training: is the policy better than it was, by how much, and how sure is that."""
