"""Made web pages whose main text is known: real paragraphs in the layouts of the web, with what stands around them."""

import random
from collections.abc import Sequence

MENU = ["Home", "News", "About us", "Contact", "Products", "Blog", "Archive", "Sign in", "Careers"]
NOISE = [
    "We use cookies to give you the best experience on our website. Read our cookie policy to find out more.",
    "Subscribe to our newsletter and never miss a story. You can leave at any time, and we never share your address.",
    "© 2024 Example Media Ltd. All rights reserved. No part of this site may be reproduced without written permission.",
    "Share this article on Facebook, Twitter, LinkedIn or by e-mail.",
    "Advertisement",
    "You must be logged in to post a comment. New here? Create an account in less than a minute, it is free of charge.",
]
COMMENTS = [
    "Great article, thanks for sharing this with us, I have learned a lot today and will come back for more of it!",
    "I do not agree with the second point at all, because it leaves out everything that happened before the war began.",
    "First!",
    "Does anybody know where one can read more about this? The link at the bottom does not work for me any more.",
]


def make_page(generator: random.Random, paragraphs: Sequence[str], titles: Sequence[str]) -> tuple[str, str]:
    """(html, main text): 3 to 9 paragraphs, headings, sometimes a list; one of five layouts."""
    title = generator.choice(titles)
    parts, truth = [f"<h1>{title}</h1>"], [title]
    for number, text in enumerate(generator.sample(list(paragraphs), generator.randrange(3, 10))):
        if number and generator.random() < 0.3:
            heading = generator.choice(titles)
            parts.append(f"<h2>{heading}</h2>")
            truth.append(heading)
        words = text.split()
        truth.append(text)
        if len(words) > 20 and generator.random() < 0.4:  # a link within the text
            at = generator.randrange(len(words) - 3)
            words[at : at + 2] = [f'<a href="/x">{" ".join(words[at : at + 2])}</a>']
        parts.append(f"<p>{' '.join(words)}</p>")
        if generator.random() < 0.2:
            items = [" ".join(generator.choice(paragraphs).split()[:9]) for _ in range(3)]
            parts.append(f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>")
            truth.extend(items)
    return _layout(generator, title, "\n".join(parts), titles), "\n".join(truth)


def _links(generator: random.Random, texts: Sequence[str], count: int) -> str:
    return "".join(f'<li><a href="/{i}">{generator.choice(texts)}</a></li>' for i in range(count))


def _layout(generator: random.Random, title: str, content: str, titles: Sequence[str]) -> str:
    menu = f"<ul>{_links(generator, MENU, 8)}</ul>"
    related = f"<h3>Related stories</h3><ul>{_links(generator, titles, 6)}</ul>"
    comments = "".join(f"<div><b>user{i}</b><p>{generator.choice(COMMENTS)}</p></div>" for i in range(4))
    cookie, footer = f"<div><p>{NOISE[0]}</p></div>", f"<p>{NOISE[2]}</p><ul>{_links(generator, MENU, 6)}</ul>"
    share, letter = f"<div>{NOISE[3]}</div>", f"<p>{NOISE[1]}</p>"
    kind = generator.randrange(5)
    if kind == 0:  # the elements that HTML 5 has for it
        body = (
            f"<header><nav>{menu}</nav></header><main><article>{content}</article></main><aside>{related}</aside>"
            f'<section class="comments">{comments}</section><footer>{footer}</footer>'
        )
    elif kind == 1:  # named divs
        body = (
            f'<div id="top-menu">{menu}</div><div class="wrapper"><div class="post-content">{content}</div>'
            f'<div class="sidebar">{related}{letter}</div></div><div class="comments">{comments}</div>'
            f'<div class="footer">{footer}</div>'
        )
    elif kind == 2:  # divs with names that say nothing
        body = (
            f"<div class='c1'>{menu}</div><div class='c2'><div class='c3'>{content}</div>"
            f"<div class='c4'>{related}</div></div><div class='c5'>{footer}</div>"
        )
    elif kind == 3:  # a table for a layout, paragraphs that are not closed
        body = (
            f"<table><tr><td>{menu}</td><td>{content.replace('</p>', '')}</td><td>{related}</td></tr>"
            f"<tr><td colspan=3>{footer}</td></tr></table>"
        )
    else:  # much around little
        body = (
            f"<div role='banner'>{cookie}</div><div class='nav-bar'>{menu}{menu}</div>{share}"
            f"<div class='entry'>{content}</div><div class='share-buttons'>{share}</div>"
            f"<div class='related-posts'>{related}</div>"
            f"<div class='newsletter'>{letter}</div><div id='disqus'>{comments}</div><footer>{footer}</footer>"
        )
    scripts = "<script>var x = {'a': '<p>not text</p>'};</script><style>p { color: red }</style>"
    head = f"<head><title>{title} | Example</title>{scripts}</head>"
    return f"<!doctype html><html>{head}<body>{body}{scripts}</body></html>"
