"""Uploads to S3 and to VESSL's volumes: S3 is moto, VESSL a stand-in on this machine."""
import boto3, pytest

from test_remote import Server
from test_storage import here, setup, write_lines # noqa: F401 (a fixture)
from vessl_service import TOKEN, Service

KEYS = dict(aws_access_key_id='AKIAEXAMPLE', aws_secret_access_key='secret-example')

@pytest.fixture
def bucket(tmp_path_factory):
    "A bucket `data` on an S3 server (moto)."
    server = Server(tmp_path_factory.mktemp('s3'), '/moto-api/', ['moto_server', '-H', '127.0.0.1', '-p'])
    try:
        server.start()
        s3 = boto3.client('s3', endpoint_url=server.uri, region_name='eu-north-1', **KEYS)
        s3.create_bucket(Bucket='data', CreateBucketConfiguration=dict(LocationConstraint='eu-north-1'))
        s3.at = server.uri
        yield s3
    finally: server.kill()

@pytest.fixture
def mbpp(here): # noqa: F811
    row = dict(text='t', test_list=['assert 1'], test_setup_code='', challenge_test_list=[])
    write_lines(here/'mbpp.jsonl', [dict(row, task_id=i, code=f'x = {i}') for i in (100, 550, 700)])
    setup(here, 'data', 'mbpp', '--from', str(here))
    return here/'storage/datasets/mbpp'

def held(bucket, key): return bucket.get_object(Bucket='data', Key=key)['Body'].read()

def test_upload_to_s3(here, bucket, mbpp): # noqa: F811
    env = {k.upper(): v for k, v in KEYS.items()}
    env |= dict(AWS_ENDPOINT_URL=bucket.at, AWS_EC2_METADATA_DISABLED='true')
    def send(to, code=0): return setup(here, 'upload', 'datasets/mbpp', to, code=code, **env)
    key = 'wmtp/datasets/mbpp/train.jsonl'
    assert '14 of 14 files sent' in send('s3://data/wmtp').stdout
    assert held(bucket, key) == (mbpp/'train.jsonl').read_bytes()
    (mbpp/'train.jsonl').write_text('{}\n')
    assert '1 of 14 files sent' in send('s3://data/wmtp').stdout and held(bucket, key) == b'{}\n'
    err = send('s3://nobucket/wmtp', code=2).stderr
    assert 's3://nobucket does not take' in err and 'secret-example' not in err
    for wrong in ('/tmp', 'volume://vessl-storage/datasets'):
        assert 'is no place to upload to' in setup(here, 'upload', 'datasets/mbpp', wrong, code=2).stderr

def test_upload_to_a_volume_of_vessl(here, bucket, mbpp): # noqa: F811
    """The real client asks the stand-in where the volume lies, and sends the files to an S3 server there.

    A run imports the volume as storage/datasets."""
    with Service() as service:
        env = dict(VESSL_API_HOST=service.url, VESSL_ACCESS_TOKEN=TOKEN)
        token = dict(session_token=None, access_key_id=KEYS['aws_access_key_id'],
                     secret_access_key=KEYS['aws_secret_access_key'])
        service.bucket = dict(bucket_name='data', region='eu-north-1', endpoint=bucket.at, force_path_style=True,
                              s3_token=token)
        out = setup(here, 'upload', 'datasets/mbpp', **env).stdout
        assert '14 of 14 files sent to volume://vessl-storage' in out
        files = {o['Key']: held(bucket, o['Key']) for o in bucket.list_objects_v2(Bucket='data')['Contents']}
        sent = [f for f in mbpp.rglob('*') if f.is_file()]
        assert files == {f.relative_to(here/'storage').as_posix(): f.read_bytes() for f in sent}
        (here/'storage/downloads').mkdir()
        (here/'storage/downloads/x').write_text('x')
        err = setup(here, 'upload', 'downloads/x', code=2, **env).stderr
        assert 'no such' in err and 'Traceback' not in err # no such volume
        wrong = {**env, 'VESSL_ACCESS_TOKEN': 'wrong'}
        assert 'vessl configure' in setup(here, 'upload', 'datasets/mbpp', code=2, **wrong).stderr
        service.bucket['bucket_name'] = 'nobucket'
        err = setup(here, 'upload', 'datasets/mbpp', code=2, **env).stderr
        assert 'secret-example' not in err and 'Traceback' not in err and 'nobucket' in err, err
