"""What every room uses: worded errors, the context of a call, files that are whole, habits from other libraries."""
