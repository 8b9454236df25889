"""The form as a person uses it: JupyterLab in headless Chromium, clicked through Playwright; a stand-in for VESSL.

Screenshots go to storage/screenshots/. Without /usr/bin/chromium (`apt-get install chromium`) the test is skipped.
"""
import re, subprocess, time
from pathlib import Path

import pytest

from test_launch import REPO, environment, project, records, until # noqa: F401 (project is a fixture)
from vessl_service import Service, TOKEN

CHROMIUM = Path('/usr/bin/chromium')
SHOTS = REPO/'storage'/'screenshots'
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason='no /usr/bin/chromium: apt-get install chromium')

@pytest.fixture
def lab(project):
    "JupyterLab on the project; its address."
    with Service(pace=2.) as service:
        env = {**environment(project), 'VESSL_API_HOST': service.url, 'VESSL_ACCESS_TOKEN': TOKEN}
        log, options = project/'home'/'jupyter.log', ['--no-browser', '--allow-root', '--LabApp.news_url=None',
            '--ServerApp.port=0', '--IdentityProvider.token=t', f'--ServerApp.root_dir={project}']
        def address(): return re.search(r'http://localhost:(\d+)/lab', log.read_text())
        with open(log, 'w') as out:
            p = subprocess.Popen(['jupyter', 'lab', *options], cwd=project, env=env, stdout=out, stderr=out,
                                 start_new_session=True)
        try:
            until(address, 60)
            port = address()[1]
            yield f'http://127.0.0.1:{port}', service
        finally: p.terminate(); p.wait(20)

def field(page, label, kind):
    return page.locator(f'.jupyter-widgets:has(> .widget-label:text-is("{label}")) {kind}').first

def shot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS/f'{name}.png', full_page=True)

def run_all(page, restart=False):
    page.get_by_role('menuitem', name='Kernel' if restart else 'Run', exact=True).click()
    page.get_by_text('Restart Kernel and Run All Cells…' if restart else 'Run All Cells', exact=True).click()
    if restart: page.locator('.jp-Dialog button.jp-mod-accept').click()

# milliseconds from a key press to the new preview, on the page's own clock
TYPE_AND_WAIT = '''box => new Promise(done => {
    const start = performance.now()
    const changed = () => document.body.innerText.includes('24 = 6 × 1 × 4') && done(performance.now() - start)
    new MutationObserver(changed).observe(document.body, {childList: true, subtree: true, characterData: true})
    box.value = '24'
    box.dispatchEvent(new Event('input', {bubbles: true}))
})'''

def view(page, name): return page.locator(f'.wmtp-run:has-text("{name}")').first

def test_form_in_jupyterlab(lab, project):
    from playwright.sync_api import expect, sync_playwright
    address, service = lab
    with sync_playwright() as pw:
        options = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
        browser = pw.chromium.launch(executable_path=str(CHROMIUM), args=options)
        page = browser.new_page(viewport={'width': 1300, 'height': 1500})
        page.set_default_timeout(60_000); expect.set_options(timeout=60_000)
        page.goto(f'{address}/lab/tree/nbs/launch.ipynb?token=t')
        page.locator('.jp-RenderedMarkdown h1:has-text("Launch a run")').first.wait_for()
        page.locator('#jp-main-statusbar', has_text='| Idle').wait_for() # the kernel is up
        start = time.perf_counter()
        run_all(page)
        field(page, 'pipeline', 'select').wait_for()
        print(f'form after {time.perf_counter() - start:.2f} s')
        shot(page, '1-form')

        # fill in: the preview follows; while the request is invalid the button is off and says why
        field(page, 'pipeline', 'select').select_option('critic')
        page.locator('.widget-toggle-button', has_text=re.compile('^4$')).click()
        batch = field(page, 'keep effective batch at', 'input')
        batch.fill('25')
        launch = page.get_by_role('button', name='Launch', exact=True)
        expect(page.get_by_text('the nearest possible are 24 and 28')).to_be_visible()
        expect(launch).to_be_disabled()
        print(f'preview after {batch.evaluate(TYPE_AND_WAIT):.0f} ms')
        expect(page.get_by_text('24 = 6 × 1 × 4')).to_be_visible()
        field(page, 'add override', 'input').fill('training.seed')
        page.locator('input[placeholder="value"]').fill('7')
        page.get_by_role('button', name='Add', exact=True).click()
        expect(page.locator('code', has_text='--override training.seed=7').first).to_be_visible()
        page.locator('summary', has_text='run YAML').click()
        expect(page.locator('details pre').first).to_be_visible()
        expect(launch).to_be_enabled()
        shot(page, '2-filled')

        # submit, and see it complete with its log
        before = records(project)
        launch.click()
        until(lambda: len(records(project) - before) == 1)
        [first] = records(project) - before
        run = view(page, first)
        page_of_run = re.compile('https://app.vessl.ai/weighted-mtp/runs/weighted-mtp/369367000001')
        expect(run.get_by_text('run page')).to_have_attribute('href', page_of_run)
        expect(run).to_contain_text('running')
        expect(run).to_contain_text(re.compile(r'step \d+ of weighted-mtp-critic-4gpu'))
        shot(page, '3-running')
        expect(run).to_contain_text('completed'); expect(run).to_contain_text('saved ✓ done')
        shot(page, '4-completed')

        # another one is stopped
        service.pace = 6.
        field(page, 'pipeline', 'select').select_option('ntp')
        expect(page.locator('code', has_text='run_ntp').first).to_be_visible() # the plan follows the choice
        launch.click()
        until(lambda: len(records(project) - before) == 2)
        [second] = records(project) - before - {first}
        run = view(page, second)
        run.get_by_role('button', name='Stop').click()
        expect(run).to_contain_text('stopped')
        expect(run.get_by_role('button', name='Stop')).to_be_disabled()
        shot(page, '5-stopped')

        # a third is under way when the kernel is restarted: the new form finds it
        field(page, 'pipeline', 'select').select_option('baseline')
        expect(launch).to_be_enabled(); launch.click()
        until(lambda: len(records(project) - before) == 3)
        [third] = records(project) - before - {first, second}
        expect(view(page, third)).to_be_visible()
        run_all(page, restart=True)
        page.locator(f'.wmtp-run:has-text("{first}")').wait_for(state='detached') # the old kernel's views are gone
        run = view(page, third)
        expect(run).to_contain_text(re.compile('pending|initializing|running'))
        shot(page, '6-reattached')
        service.pace = .5
        expect(run).to_contain_text('completed')
        browser.close()
    sent = [r['spec']['name'] for r in service.runs.values()]
    assert sent == [f'weighted-mtp-{p}-4gpu' for p in ('critic', 'ntp', 'baseline')]
