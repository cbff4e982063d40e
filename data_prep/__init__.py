"""Preparation of videos into shards, and synthetic videos to practise on."""
