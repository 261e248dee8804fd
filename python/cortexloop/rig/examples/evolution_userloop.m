function [C, timingfile, userdefined_trialholder] = evolution_userloop(MLConfig, TrialRecord)
% Userloop for NIMH MonkeyLogic 2: each trial shows the next few images that a session asks for.
%
%   cortexloop serve monkeylogic_tcp.toml       on the server
%
% Put RigClient.m, this file and evolution_timing.m into one folder on the rig, and set the constants below. Written
% after MonkeyLogic's manual and tried with a stand-in for MonkeyLogic in GNU Octave, not yet on a rig.
%
% A batch is cut into trials of PER_TRIAL presentations. After each trial, what was shown is reported, with the outcome
% of the trial; presentations of a trial that was broken off are shown again by the session, in a batch of kind
% "repair". Responses are told when the last trial of a batch is over.

HOST = '192.168.1.10'; PORT = 5558; SECRET = 'the secret of the server';
PER_TRIAL = 5;
UNITS = {'ch17'};

persistent rig batch queue shown_ids onsets folder synced
C = {'fix(0,0)'};
timingfile = 'evolution_timing.m';
userdefined_trialholder = '';

if isempty(rig)
    % MonkeyLogic calls this once before the first trial, only to learn the names of the timing files.
    rig = RigClient(HOST, PORT, 'monkeylogic', SECRET);
    folder = tempname();
    mkdir(folder);
    synced = -inf;
    queue = {};
    return
end

if rig.now_ns() - synced > 5e9
    rig.sync_clock('rig');
    synced = rig.now_ns();
end

% What became of the last trial. The timing file leaves it in TrialRecord.User.
if isfield(TrialRecord.User, 'outcome') && ~isempty(TrialRecord.User.outcome)
    done = TrialRecord.User.pres_ids;
    events = struct('pres_id', done, 'outcome', TrialRecord.User.outcome);
    for k = 1:numel(done)
        if strcmp(events(k).outcome, 'ok')
            events(k).t_on = TrialRecord.User.onsets_ms(k);
            events(k).clock = 'monkeylogic';
            shown_ids{end + 1} = done{k};
            onsets(end + 1) = TrialRecord.User.onsets_ms(k);
        end
    end
    rig.shown(events);
    TrialRecord.User.outcome = {};
end

if isempty(queue)
    if ~isempty(batch)
        % count_spikes is yours: presentations x units for these names and onsets, NaN for what was lost.
        responses = count_spikes(shown_ids, onsets, UNITS);
        options = struct('kind', 'rate', 'window_ms', [50 200], 'final', true);
        options.pres_ids = shown_ids;
        options.status = repmat({'ok'}, 1, numel(shown_ids));
        options.status(any(~isfinite(responses), 2)) = {'missing'};
        rig.tell(batch, responses, UNITS, options);
    end
    batch = rig.next(batch);
    if isempty(batch)
        TrialRecord.Quit = true;  % the session is over
        return
    end
    for k = 1:size(batch.images, 4)
        imwrite(batch.images(:, :, :, k), fullfile(folder, sprintf('%03d.png', k)));
    end
    shown_ids = {};
    onsets = [];
    queue = num2cell(1:numel(batch.order));
end

now_shown = [queue{1 : min(PER_TRIAL, end)}];
queue(1:numel(now_shown)) = [];
TrialRecord.User.pres_ids = batch.pres_ids(now_shown);
TrialRecord.User.files = arrayfun(@(k) fullfile(folder, sprintf('%03d.png', k)), batch.order(now_shown), ...
    'UniformOutput', false);
end
