"""The documentation site, built by `make docs` and read in a browser from its folder: no server, no network."""
import os, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
import pytest
from bs4 import BeautifulSoup

REPO = Path(__file__).parent.parent
CHROMIUM = '/usr/bin/chromium'

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "`make docs`, into a folder of its own; strict, so that mkdocs' own warnings fail it."
    folder, bin_ = tmp_path_factory.mktemp('site'), Path(sys.executable).parent
    command = ['make', 'docs', '-o', '.venv/.installed', f'SITE={folder}', f'BIN={os.path.relpath(bin_, REPO)}']
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

class Links(HTMLParser): # 100 MB of pages: no tree is made of them
    def __init__(self, page):
        super().__init__()
        self.ids, self.links = {'__codelineno'}, set()
        self.feed(page)
    def handle_starttag(self, tag, attributes):
        for key, value in attributes:
            if key == 'id': self.ids.add(value)
            elif key in ('href', 'src') and value is not None: self.links.add(value)

def test_no_link_of_the_site_is_broken(site):
    pages = {p: Links(p.read_text()) for p in site.rglob('*.html')}
    broken = set()
    for path, page in pages.items():
        if path.name == '404.html': continue # its links are absolute
        for link in page.links:
            if urlsplit(link).scheme in ('http', 'https', 'data', 'mailto'): continue
            address, anchor = urldefrag(urljoin(path.as_uri(), link))
            target = Path(unquote(urlsplit(address).path))
            missing = anchor and target in pages and unquote(anchor) not in pages[target].ids
            if missing or not target.exists(): broken.add((str(path.relative_to(site)), link))
    assert len(pages) > 60 and not broken

def test_pages_load_nothing_from_a_network(site):
    loads = re.compile(r'<(?:script|img|iframe)[^>]+src="https?:|<link[^>]+rel="stylesheet"[^>]+href="https?:')
    assert not [str(p.relative_to(site)) for p in site.rglob('*.html') if loads.search(p.read_text())]

def test_the_maps_are_drawn_and_name_modules_that_exist():
    import runpy
    maps = runpy.run_path(str(REPO/'docs/maps.py'))
    named = {m for _, rooms, _ in maps['MAPS'].values() for _, _, modules in rooms for m in modules}
    assert not {m for m in named if not (REPO/f'weighted_mtp/{m}.py').is_file()}
    for name, map_ in maps['MAPS'].items(): assert (REPO/f'docs/images/{name}.svg').read_text() == maps['draw'](*map_)

def test_every_config_key_is_explained(site):
    from weighted_mtp.schema import config_keys
    rows = {r.find('code').text: [c.text for c in r.find_all('td')]
            for r in BeautifulSoup((site/'config.html').read_text(), 'html.parser').find_all('tr') if r.find('code')}
    assert rows.keys() == set(config_keys())
    assert not [key for key, (_, may_be, default, meaning) in rows.items() if not (may_be and default and meaning)]
    assert rows['training.k_percent'][1] == 'a number above 0 and at most 1'

@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason='no chromium')
@pytest.mark.parametrize('width', [1300, 390])
def test_a_reader_searches_and_follows_links(site, width):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        options = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
        browser = p.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_context(viewport=dict(width=width, height=900)).new_page()
        outside, failed = [], []
        page.on('request', lambda r: r.url.startswith('http') and outside.append(r.url))
        page.on('requestfailed', lambda r: 'ABORTED' in r.failure or failed.append(r.url)) # aborted: left too soon
        page.goto((site/'index.html').as_uri())
        if width < 600: page.locator('label.md-header__button[for=__search]').click()
        page.locator('input.md-search__input').press_sequentially('token weights')
        page.locator('.md-search-result__link').first.wait_for(timeout=60_000)
        titles = page.locator('.md-search-result__link h1').all_inner_texts()
        assert 'weighting' in ' '.join(titles), titles
        page.locator('.md-search-result__link').first.click()
        page.goto((site/'index.html').as_uri())
        for words in ('docs/tutorial.md', 'docs/launching.md', 'CONTRIBUTING.md'):
            page.get_by_role('link', name=words, exact=True).first.click()
            page.wait_for_load_state()
            assert page.locator('article h1').inner_text()
            assert page.evaluate('document.documentElement.scrollWidth <= innerWidth'), page.url # no sideways scrolling
            page.go_back()
        assert not outside and not failed
        browser.close()
